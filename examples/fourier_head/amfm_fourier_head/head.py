"""The Fourier head (Gillman et al. 2024, arXiv 2410.22269): a smooth density over ordered bins; see the README for the formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from amfm.kernels.linear_cross_entropy.op import CrossEntropy
from amfm.model.block import Stream
from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel, ModelOutput
from amfm.model.loss import IGNORE_INDEX
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups

FLOOR = 1e-6  # added to the density, so that no label is impossible


class FourierHead(nn.Module):
    """log p [..., V] over V bins in [-1, 1] from hidden [..., D], with a density of `num_frequencies` frequencies."""

    def __init__(self, hidden_size: int, num_bins: int, num_frequencies: int, generator: torch.Generator) -> None:
        super().__init__()
        if not 0 < num_frequencies < num_bins / 2:
            raise ValueError(
                f"num_frequencies={num_frequencies} must be above 0 and below half of the {num_bins} bins: higher ones "
                "look like lower ones there; lower it"
            )
        rows = 2 * (num_frequencies + 1)
        self.weight = nn.Parameter(torch.empty(rows, hidden_size).normal_(0.0, hidden_size**-0.5, generator=generator))
        # A density of one constant: the first coefficient is 1 + 0i.
        self.bias = nn.Parameter(torch.zeros(rows))
        with torch.no_grad():
            self.bias[0] = 1.0
        self.num_bins = num_bins

    def coefficients(self, hidden: Tensor) -> Tensor:
        """a [..., N + 1] complex; float32 at least."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        numbers = hidden.to(wide) @ self.weight.to(wide).T + self.bias.to(wide)
        return torch.complex(*numbers.chunk(2, dim=-1))

    def forward(self, hidden: Tensor) -> Tensor:
        """Log probabilities of the bins."""
        a = self.coefficients(hidden)
        real = a.real.dtype
        # Middles of equal bins; |sum_l a_l e^(i pi l z)|^2 is the density up to a factor, and never below zero.
        z_V = (2 * torch.arange(self.num_bins, dtype=real, device=a.device) + 1) / self.num_bins - 1
        number_N = torch.arange(a.shape[-1], dtype=real, device=a.device)
        waves_NV = torch.polar(torch.ones((), dtype=real, device=a.device), math.pi * number_N[:, None] * z_V)
        power = (a @ waves_NV).abs().square()
        density = power / (2 * a.abs().square().sum(-1, keepdim=True)) + FLOOR
        return density.log() - density.sum(-1, keepdim=True).log()


class FourierModel(HybridModel):
    """A hybrid model with this head over its vocabulary, whose tokens are bins in order; on one rank."""

    def __init__(self, config: ModelConfig, *, num_frequencies: int, backend: str = "torch", seed: int = 0) -> None:
        if config.tie_embeddings:
            raise ValueError(
                "the Fourier head has no row per token to share with the embedding; use tie_embeddings: false"
            )
        if config.num_depths:
            raise ValueError("the Fourier head does not look ahead; take / and its depths out of model.pattern")
        super().__init__(config, single_rank_groups(), backend=backend, seed=seed)
        self.head = None
        generator = torch.Generator().manual_seed(seed)
        self.fourier = FourierHead(config.hidden_size, config.vocab_size, num_frequencies, generator)

    def finish(
        self,
        stream: Stream,
        labels_BT: Tensor | None,
        *,
        predicts: bool = False,
        ahead: Sequence[Any] = (),
        meta: PackMeta | None = None,
    ) -> ModelOutput:
        """As the base class, with log probabilities for logits."""
        assert self.final_norm is not None and stream.delta_BTD is not None, "one rank has all blocks"
        hidden_BTD = self.final_norm.add(stream.delta_BTD, stream.residual_BTD)[0]
        log_p_BTV = self.fourier(hidden_BTD)
        if labels_BT is None:
            return ModelOutput(log_p_BTV, None, stream.auxiliary, stream.expert_counts)
        counts_BT = labels_BT != IGNORE_INDEX
        picked_BT1 = log_p_BTV.gather(-1, labels_BT.clamp(min=0)[..., None])
        nll_R = -torch.where(counts_BT, picked_BT1[..., 0], 0.0).flatten()
        loss = CrossEntropy(nll_R.sum(), nll_R.detach().sum(), nll_R.detach().float())
        predictions = log_p_BTV.detach().argmax(-1) if predicts else None
        return ModelOutput(None, loss, stream.auxiliary, stream.expert_counts, predictions_BT=predictions)
