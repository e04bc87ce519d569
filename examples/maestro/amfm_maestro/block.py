"""Maestro (Horvath et al. 2023, arXiv 2308.14929) as a block: low-rank matrices that a step computes in part.

In each training step one matrix of all blocks computes with only its leading components. Which, and how many, is a
function of the seed and the step, the same on all ranks (`set_step`, pretrain/step.py): there is nothing to save.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amfm.kernels.linear.op import linear
from amfm.kernels.swiglu.gate import find_gate, name_activation
from amfm.kernels.swiglu.op import squared_relu, swiglu
from amfm.model.mixers.interface import BlockState, BuildContext, Mixer, MixerOutput
from amfm.model.packing import PackMeta
from amfm.model.parallel.layers import stream_shard
from amfm.model.structured import dense_singular_values, orthonormal
from amfm_maestro.spec import MaestroOptions

MATRICES = ("up", "down")


class MaestroMixer(Mixer):
    """down_second down_first activation(up_second up_first x), each product with its leading components."""

    def __init__(self, options: MaestroOptions, build: BuildContext) -> None:
        super().__init__()
        if options.ranks is not None and len(options.ranks) != build.alike:
            raise ValueError(
                f"model.mixers.maestro.ranks has {len(options.ranks)} entries, and model.pattern {build.alike} blocks "
                "{maestro}; give one for each"
            )
        self.options, self.build = options, build
        self.unit = find_gate(name_activation(options.activation, None))
        inner, hidden = options.hidden_size, build.hidden_size
        up, down = options.ranks_of(build.number)
        self.up_first = nn.Parameter(torch.empty(up, hidden))
        self.up_second = nn.Parameter(torch.empty(inner * (1 if self.unit is None else 2), up))
        self.down_first = nn.Parameter(torch.empty(down, inner))
        self.down_second = nn.Parameter(torch.empty(hidden, down))
        self.shards = {name: stream_shard(build.groups) for name, _ in self.named_parameters()}
        self.leading = {"up": up, "down": down}

    def set_step(self, step: int, total_steps: int, seed: int) -> None:
        """Draw a matrix and a number of its components, among all pairs alike likely; the others compute with all."""
        ranks = [rank for number in range(self.build.alike) for rank in self.options.ranks_of(number)]
        own = self.options.ranks_of(self.build.number)
        self.leading = dict(zip(MATRICES, own))
        if not self.options.orders:
            return
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        left = int(torch.randint(sum(ranks), (), generator=generator))
        for place, rank in enumerate(ranks):
            if left < rank:
                if place // 2 == self.build.number:
                    self.leading[MATRICES[place % 2]] = 1 + left
                return
            left -= rank

    def forward(self, x_BTD: Tensor, meta: PackMeta, state: BlockState = None) -> MixerOutput:
        """Map the residual stream x [B, T, D] -> [B, T, D], each token on its own."""
        inner = self.multiply(x_BTD, "up")
        backend = self.build.backend
        inner = squared_relu(inner, backend=backend) if self.unit is None else swiglu(inner, self.unit, backend=backend)
        auxiliary: dict[str, Tensor] = {}
        if self.training and self.options.penalty:
            # Every context rank adds its share of what they all compute alike.
            auxiliary = {"tails": self.options.penalty * self.tails() / self.build.groups.cp.size()}
        return MixerOutput(self.multiply(inner, "down"), None, auxiliary)

    def factors(self, which: str) -> tuple[Tensor, Tensor]:
        """The two factors of a matrix: first [r, in], second [out, r]."""
        return getattr(self, f"{which}_first"), getattr(self, f"{which}_second")

    def multiply(self, x: Tensor, which: str) -> Tensor:
        """Multiply by a matrix, or in training by its leading components."""
        first, second = self.factors(which)
        number = self.leading[which] if self.training else len(first)
        return linear(linear(x, first[:number].contiguous()), second[:, :number].contiguous())

    def tails(self) -> Tensor:
        """Sum over both matrices and b of |first from row b on| + |second from column b on|."""
        parts = []
        for which in MATRICES:
            first, second = self.factors(which)
            wide = torch.promote_types(first.dtype, torch.float32)
            for squares_R in (first.to(wide).square().sum(1), second.to(wide).square().sum(0)):
                tails_R = squares_R.flip(0).cumsum(0)
                # The root has no slope at zero, and a tail that is gone asks for none.
                parts.append(torch.where(tails_R > 0, tails_R, 1.0).sqrt().mul(tails_R > 0).sum())
        return torch.stack(parts).sum()

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """The largest singular values of a dense matrix of deviation 1 / sqrt(inputs), in law, shared by both factors."""
        which, _, place = name.partition("_")
        first, second = self.factors(which)
        rank, inputs = first.shape
        scales = (inputs**-0.5 * dense_singular_values(len(second), inputs, rank)).sqrt()
        return orthonormal(shape, generator) * (scales[:, None] if place == "first" else scales)
