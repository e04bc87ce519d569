"""Mixers side by side: parallel heads of attention and a state space model, as in Falcon-H1.

The mixers read one norm of the residual stream, and their outputs are added to it together. Each is the mixer that it is in its
own block, with its ranks, documents and decode state: a block of two costs what both cost, less a norm and an addition.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from amfm.model.config.kinds import find_kind
from amfm.model.config.options import ParallelOptions
from amfm.model.config.rope import RopeConfig
from amfm.model.mixers.interface import BlockState, BuildContext, Mixer, MixerOutput, ParallelState
from amfm.model.packing import PackMeta


class ParallelMixer(Mixer):
    """The sum of several sequence mixers of the same input.

    Source: Zuo et al. 2025 (arXiv 2507.22448), section 2.1; Dong et al. 2024 (arXiv 2411.13676) for heads side by side.
    """

    def __init__(self, options: ParallelOptions, build: BuildContext) -> None:
        super().__init__()
        kinds = (find_kind(name) for name in options.names)
        self.branches = nn.ModuleList(
            kind.load()(own, build) for kind, own in zip(kinds, options.branches, strict=True)
        )

    def _mixers(self) -> Iterator[Mixer]:
        return (cast(Mixer, branch) for branch in self.branches)

    def forward(self, x_BTD: Tensor, meta: PackMeta, state: BlockState = None) -> MixerOutput:
        """Mix x [B, T, D] -> y [B, T, D]; with a state each mixer continues from its own."""
        assert state is None or isinstance(state, ParallelState), f"parallel heads got a {type(state).__name__}"
        states = [None] * len(self.branches) if state is None else state.branches
        outputs = [branch(x_BTD, meta, own) for branch, own in zip(self._mixers(), states, strict=True)]
        y_BTD = outputs[0].y_BTD
        auxiliary: dict[str, Tensor] = dict(outputs[0].auxiliary or {})
        for output in outputs[1:]:
            y_BTD = y_BTD + output.y_BTD
            for name, value in (output.auxiliary or {}).items():
                auxiliary[name] = auxiliary[name] + value if name in auxiliary else value
        following = None if state is None else ParallelState(tuple(output.state for output in outputs))
        return MixerOutput(y_BTD, following, auxiliary or None)

    @property
    def is_graphable(self) -> bool:
        """Where all of them are."""
        return all(branch.is_graphable for branch in self._mixers())

    def empty_state(self, num_rows: int) -> BlockState:
        """Build the state of each mixer before the first token."""
        return ParallelState(tuple(branch.empty_state(num_rows) for branch in self._mixers()))

    def sequence_flops(self, sequence_length: int) -> float:
        """FLOPs per token of all mixers."""
        return sum(branch.sequence_flops(sequence_length) for branch in self._mixers())

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Ask the mixer whose parameter it is, `branches.N.name`."""
        _, number, own = name.split(".", 2)
        return cast(Mixer, self.branches[int(number)]).init_parameter(own, shape, generator)

    def reset_buffers(self) -> None:
        """Compute the buffers of all mixers."""
        for branch in self._mixers():
            branch.reset_buffers()

    def set_draw_seed(self, seed: int) -> None:
        """Seed all mixers."""
        for branch in self._mixers():
            branch.set_draw_seed(seed)

    def set_rope(self, rope: RopeConfig) -> None:
        """Give all mixers other rotary positions."""
        for branch in self._mixers():
            branch.set_rope(rope)
