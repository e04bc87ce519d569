"""The options of the Mamba2 mixer. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from amfm.kernels.common.limits import DECAY_LIMITS, ScanLimits
from amfm.model.config.options import Axis, MixerOptions, must_divide


class Mamba2Config(MixerOptions):
    """Mamba2 mixer (Dao and Gu 2024, arXiv 2405.21060); letter `M`."""

    num_heads: int = Field(gt=0, description="Heads of the recurrence; independent of hidden_size.")
    head_dim: int = Field(64, gt=0, description="Channels per head; inner width = num_heads * head_dim.")
    state_size: int = Field(128, gt=0, description="State numbers per channel (N).")
    num_groups: int = Field(
        8,
        gt=0,
        description="Groups that share B and C; must divide num_heads. vLLM needs a multiple of its tensor ranks.",
    )
    conv_kernel: int = Field(4, ge=2, le=4, description="Width of the causal depthwise convolution over x, B and C.")
    conv_bias: bool = Field(True, description="Bias in the convolution.")
    chunk_size: int = Field(
        64, gt=0, description="Tokens per chunk of the scan; changes speed and rounding, not meaning."
    )
    keep_states: bool = Field(
        False,
        description="Keep the scan's results (as wide as x) and the states that enter chunks (state_size / chunk_size times x) "
        "for backward, 2 to 3 times the width of x; else it makes them again: a tenth more traffic of the scan, a launch more. "
        "Better true where train.recompute makes the block again anyway. Triton only: torch always keeps them.",
    )
    a_init_min: float = Field(
        1.0, gt=0, description="-A starts uniform in [a_init_min, a_init_max], one number per head."
    )
    a_init_max: float = Field(16.0, gt=0, description="Upper end of the range for -A.")
    time_step_min: float = Field(1e-3, gt=0, description="dt starts log-uniform in [time_step_min, time_step_max].")
    time_step_max: float = Field(1e-1, gt=0, description="Upper end of the range for the initial dt.")
    time_step_floor: float = Field(1e-4, gt=0, description="Smallest initial dt; dt is never clamped at run time.")

    def inner_size(self) -> int:
        """Width of x and z: num_heads * head_dim."""
        return self.num_heads * self.head_dim

    def conv_channels(self) -> int:
        """Channels that pass the convolution: x, B and C."""
        return self.inner_size() + 2 * self.num_groups * self.state_size

    training_only: ClassVar[frozenset[str]] = frozenset(
        ("chunk_size", "keep_states", "a_init_min", "a_init_max", "time_step_min", "time_step_max", "time_step_floor")
    )

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        """Heads share groups evenly, and ranges begin at their lower end."""
        yield from must_divide("num_groups", self.num_groups, "model.mamba.num_heads", self.num_heads)
        for low, high in (("a_init_min", "a_init_max"), ("time_step_min", "time_step_max")):
            if getattr(self, low) > getattr(self, high):
                yield low, f"must not exceed model.mamba.{high}={getattr(self, high)}; swap them"

    def cut_evenly(self) -> dict[Axis, dict[str, int]]:
        """Heads."""
        return {"tensor": {"num_heads": self.num_heads}}

    def cut_or_copied(self) -> dict[str, int]:
        """Groups may be fewer than tensor ranks."""
        return {"num_groups": self.num_groups}

    def lookback(self) -> tuple[int, str]:
        """What the convolution reads."""
        return self.conv_kernel - 1, "conv_kernel"

    def scan(self) -> tuple[ScanLimits, int, tuple[int, int]]:
        """As the limits of its kernels say."""
        return DECAY_LIMITS, self.chunk_size, (self.state_size, self.head_dim)

    def recurrence_flops(self) -> int:
        """Of the recurrence itself, whatever the chunk: a state number a token takes decay, times B, add, times C, add."""
        # Then D x on each channel.
        return 5 * self.inner_size() * self.state_size + 2 * self.inner_size()
