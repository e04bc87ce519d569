"""Sizes and forms of one rank's part of a delta mixer, which its tensors do not tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from torch import Tensor

Decay = Literal["none", "softplus", "floor"]
Activation = Literal["none", "silu", "sigmoid"]
DECAYS: tuple[Decay, ...] = ("none", "softplus", "floor")
ACTIVATIONS: tuple[Activation, ...] = ("none", "silu", "sigmoid")


@dataclass(frozen=True)
class DeltaSizes:
    """H heads with states of K x V, N steps per token, in G key heads that share q and k.

    decay: -e^A softplus(raw + bias), or floor sigmoid(e^A (raw + bias)); with `channels` one per key channel, else one per head. act: of
    the gate on each head's normed output. beta = factor sigmoid(raw).
    """

    key_heads: int
    heads: int
    key: int
    value: int
    steps: int
    decay: Decay
    channels: bool
    act: Activation
    epsilon: float
    factor: float = 1.0
    floor: float = 0.0

    @classmethod
    def of(cls, numbers: Sequence[int], floats: Sequence[float]) -> DeltaSizes:
        """From what a custom operation takes."""
        key_heads, heads, key, value, steps, decay, channels, act = numbers
        forms = DECAYS[decay], bool(channels), ACTIVATIONS[act]
        return cls(key_heads, heads, key, value, steps, *forms, *floats)

    @property
    def numbers(self) -> list[int]:
        """The integers in their order, as `of` takes them."""
        sizes = [self.key_heads, self.heads, self.key, self.value, self.steps]
        return [*sizes, DECAYS.index(self.decay), int(self.channels), ACTIVATIONS.index(self.act)]

    @property
    def floats(self) -> list[float]:
        """The others in their order, as `of` takes them."""
        return [self.epsilon, self.factor, self.floor]

    @property
    def inner(self) -> int:
        """Width of o and of the gate: heads times values."""
        return self.heads * self.value

    @property
    def convolved(self) -> list[int]:
        """Widths of q, k and v."""
        keys = self.key_heads * self.key
        return [keys, keys * self.steps, self.inner * self.steps]

    @property
    def channel_count(self) -> int:
        """Channels that pass the convolution."""
        return sum(self.convolved)

    @property
    def decays(self) -> int:
        """Raw numbers of a token's decays."""
        return 0 if self.decay == "none" else self.heads * (self.key if self.channels else 1)

    def widths(self, *, decay: bool, gate: bool) -> dict[str, int]:
        """Widths of the parts of the projection in their order; without `decay` and `gate` those come from elsewhere."""
        q, k, v = self.convolved
        parts = {"q": q, "k": k, "v": v, "beta": self.heads * self.steps}
        if decay and self.decays:
            parts["decay"] = self.decays
        if gate and self.act != "none":
            parts["gate"] = self.inner
        return parts


def cut_columns(x: Tensor, widths: dict[str, int]) -> dict[str, Tensor]:
    """Parts of the last dimension by name, as views."""
    return dict(zip(widths, x.split(list(widths.values()), dim=-1)))


def row_ranges(widths: Sequence[int]) -> Iterator[slice]:
    """The places of parts that stand one after the other."""
    ends = list(accumulate(widths))
    return (slice(end - width, end) for width, end in zip(widths, ends))
