"""Sizes of one rank's part of Mamba2's mixer, which its tensors do not tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


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
