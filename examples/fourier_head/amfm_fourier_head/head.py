"""The Fourier head (Gillman et al. 2024, arXiv 2410.22269): a smooth density over ordered bins; see the README for the formula.

Its frequencies are below half of the bins, so that every wave sums to zero over their centers: the sum by which a density
is divided is V / 2 whatever the coefficients are, and a loss needs the density only at the labels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from amfm.kernels.linear_cross_entropy.op import CrossEntropy
from amfm.model.config.schema import ModelConfig
from amfm.model.loss import IGNORE_INDEX, Head, HeadOutput
from amfm_fourier_head.spec import FourierHeadOptions

FLOOR = 1e-6  # added to the density, so that no label is impossible


class FourierHead(Head):
    """log p over V bins in [-1, 1] from the residual stream, with a density of `num_frequencies` frequencies."""

    def __init__(self, options: FourierHeadOptions, config: ModelConfig) -> None:
        super().__init__()
        if not options.num_frequencies < config.vocab_size / 2:
            raise ValueError(
                f"model.mixers.fourier_head.num_frequencies={options.num_frequencies} must be below half of "
                f"model.vocab_size={config.vocab_size}: higher ones look like lower ones there; lower it"
            )
        self.options, self.num_bins = options, config.vocab_size
        rows = 2 * (options.num_frequencies + 1)
        self.weight = nn.Parameter(torch.empty(rows, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(rows))

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """A density that is nearly constant: the first coefficient is near 1."""
        if name == "bias":
            return torch.eye(1, shape[0])[0]
        return torch.empty(shape).normal_(0.0, shape[1] ** -0.5, generator=generator)

    def coefficients(self, hidden: Tensor) -> Tensor:
        """a [..., N + 1] complex; float32 at least."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        numbers = hidden.to(wide) @ self.weight.to(wide).T + self.bias.to(wide)
        return torch.complex(*numbers.chunk(2, dim=-1))

    def log_density(self, power: Tensor, a: Tensor) -> Tensor:
        """log p of bins from |sum_l a_l e^(i pi l z)|^2, which is the density times 2 c_0, and never below zero."""
        density = power / (2 * a.abs().square().sum(-1, keepdim=True)) + FLOOR
        return density.log() - math.log(self.num_bins * (0.5 + FLOOR))

    def waves(self, bins: Tensor, like: Tensor) -> Tensor:
        """e^(i pi l z) at the centers of bins [...] -> [..., N + 1]."""
        z = (2 * bins.to(like.real.dtype) + 1) / self.num_bins - 1
        number_N = torch.arange(like.shape[-1], dtype=z.dtype, device=z.device)
        return torch.polar(torch.ones_like(number_N), math.pi * z[..., None] * number_N)

    def forward(self, hidden_BTD: Tensor, labels_BT: Tensor | None = None) -> HeadOutput:
        """Log probabilities of all bins, or sums of the loss at the labels, the penalty among them."""
        a = self.coefficients(hidden_BTD)
        if labels_BT is None:
            waves_VN = self.waves(torch.arange(self.num_bins, device=a.device), a)
            return HeadOutput(self.log_density((a @ waves_VN.T).abs().square(), a))
        counts_BT = labels_BT != IGNORE_INDEX
        waves = self.waves(labels_BT.clamp(min=0), a)
        log_p_BT = self.log_density((a * waves).sum(-1, keepdim=True).abs().square(), a)[..., 0]
        nll_R = -torch.where(counts_BT, log_p_BT, 0.0).flatten()
        total, auxiliary = nll_R.sum(), {}
        if self.options.smoothness and self.training:
            # In the loss, and so divided by the step's count as that is; the metric has no gradient.
            penalty = self.options.smoothness * torch.where(counts_BT, roughness(a), 0.0).sum()
            total = total + penalty
            auxiliary = {"smoothness": (penalty / counts_BT.sum().clamp(min=1)).detach()}
        return HeadOutput(None, CrossEntropy(total, nll_R.detach().sum(), nll_R.detach().float()), auxiliary)


def roughness(a: Tensor) -> Tensor:
    """4 pi^2 sum_k k^2 |c_k|^2 of the autocorrelations c of a [..., N + 1] complex, by a transform: [...]."""
    size = a.shape[-1]
    power = torch.fft.fft(a, 2 * size).abs().square()
    c = torch.fft.ifft(power)[..., :size]
    number_N = torch.arange(size, dtype=power.dtype, device=a.device)
    return 4 * math.pi**2 * (number_N.square() * c.abs().square()).sum(-1)
