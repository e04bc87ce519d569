"""One rank's part of a mixer: its sizes, which its tensors do not tell, and what segments of rows hand each other.

Segments are on other ranks or on the same one, and a mixer computes them as one operation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from amfm.kernels.common.inputs import first_tokens


@dataclass(frozen=True)
class MixerSizes:
    """H heads of P channels in G groups that share B and C with N state numbers; the norm is taken over `norm_groups` groups."""

    heads: int
    head_dim: int
    groups: int
    state: int
    norm_groups: int
    epsilon: float

    @classmethod
    def of(cls, numbers: Sequence[int], epsilon: float) -> MixerSizes:
        """From the integers in their order, as a custom operation takes them."""
        heads, head_dim, groups, state, norm_groups = numbers
        return cls(heads, head_dim, groups, state, norm_groups, epsilon)

    @property
    def numbers(self) -> list[int]:
        """The integers in their order, as `of` takes them."""
        return [self.heads, self.head_dim, self.groups, self.state, self.norm_groups]

    @property
    def inner(self) -> int:
        """Width of z, x and y: heads times channels."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Channels that pass the convolution: x, B and C."""
        return self.inner + 2 * self.groups * self.state

    def parts(self) -> list[int]:
        """Widths of z, of what is convolved, and of dt, in the order of the projection."""
        return [self.inner, self.channels, self.heads]

    def split(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split [..., channels] into x [..., H, P], B and C [..., G, N]: views."""
        shared = self.groups * self.state
        x, B, C = convolved.split([self.inner, shared, shared], dim=-1)
        return (
            x.unflatten(-1, (self.heads, self.head_dim)),
            B.unflatten(-1, (self.groups, self.state)),
            C.unflatten(-1, (self.groups, self.state)),
        )


class Exchange(Protocol):
    """What R segments tell each other, wherever they are: segments are rows, and a row's first one begins from zeros."""

    def windows(self, inputs_RLC: Tensor, width: int) -> Tensor:
        """The `width` inputs before each segment [R, width, C]; zeros where they are of another document than its first token."""
        ...

    def windows_back(self, d_windows_RWC: Tensor) -> Tensor:
        """From gradients of the windows to those of each segment's last inputs, [R, width, C]."""
        ...

    def states(self, final_RHNP: Tensor, factor_RH: Tensor) -> tuple[Tensor, Tensor]:
        """The state that enters each segment, and what `states_back` needs of all.

        Of the states after segments that began from zero, and of what segments do to a state that enters them: factors [R, H],
        or matrices [R, H, K, K] to its left.
        """
        ...

    def states_back(self, d_entering_RHNP: Tensor, kept: Tensor) -> Tensor:
        """Gradients of the states after segments.

        Of those of the states that enter segments, as they would be if nothing read what leaves them.
        """
        ...


class SegmentsInOrder:
    """The exchange of one row's segments that are all here, in their order; ids [R, L] of its documents.

    For checks of the kernels, which compare such segments with the whole row.
    """

    def __init__(self, ids_RL: Tensor) -> None:
        self.ids_RL = ids_RL
        self.goes_on_R = torch.zeros_like(ids_RL[:, 0], dtype=torch.bool)
        self.goes_on_R[1:] = ids_RL[1:, 0] == ids_RL[:-1, -1]

    def starts(self) -> Tensor:
        """The place in its segment of the first token of each token's document, [R, L] int32."""
        return first_tokens(self.ids_RL)

    def windows(self, inputs_RLC: Tensor, width: int) -> Tensor:
        """The last inputs of the segment before, of the same document."""
        return self._own(inputs_RLC[:, inputs_RLC.shape[1] - width :].roll(1, 0))

    def windows_back(self, d_windows_RWC: Tensor) -> Tensor:
        """Back to whose inputs they were."""
        return self._own(d_windows_RWC).roll(-1, 0)

    def states(self, final_RHNP: Tensor, factor_RH: Tensor) -> tuple[Tensor, Tensor]:
        """From the first segment to the last."""
        return self._pass_on(final_RHNP, factor_RH, self.goes_on_R[1:]), factor_RH

    def states_back(self, d_entering_RHNP: Tensor, kept: Tensor) -> Tensor:
        """From the last segment to the first."""
        kept = kept.flip(0) if kept.dim() == 2 else kept.flip(0).transpose(-1, -2)
        return self._pass_on(d_entering_RHNP.flip(0), kept, self.goes_on_R[1:].flip(0)).flip(0)

    def _own(self, windows_RWC: Tensor) -> Tensor:
        ids_RW = self.ids_RL[:, self.ids_RL.shape[1] - windows_RWC.shape[1] :].roll(1, 0)
        is_own_RW1 = ((ids_RW == self.ids_RL[:, :1]) & self.goes_on_R[:, None])[..., None]
        return torch.where(is_own_RW1, windows_RWC, torch.zeros_like(windows_RWC))

    def _pass_on(self, own_RHNP: Tensor, factor_RH: Tensor, goes_on_R: Tensor) -> Tensor:
        state_HNP = torch.zeros_like(own_RHNP[0])
        states = [state_HNP]
        for own_HNP, factor, goes_on in zip(own_RHNP, factor_RH, goes_on_R):
            passed_HNP = factor[:, None, None] * state_HNP if factor.dim() == 1 else factor @ state_HNP
            state_HNP = torch.where(goes_on, own_HNP + passed_HNP, torch.zeros_like(own_HNP))
            states.append(state_HNP)
        return torch.stack(states)
