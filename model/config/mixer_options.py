"""The options of our mixers: one frozen section each. No torch here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from amfm.kernels.common.limits import (
    DELTA_LIMITS,
    VECTOR_DELTA_LIMITS,
    VECTOR_GATE_LIMITS,
    ScanLimits,
)
from amfm.model.config.options import Axis, MixerOptions


class LinearOptions(MixerOptions, ABC):
    """What every mixer on a linear recurrence can choose."""

    conv_kernel: Literal[0, 2, 3, 4] = Field(
        0, description="Width of the causal depthwise convolution with SiLU before the recurrence; 0: none."
    )
    chunk_size: int = Field(
        64, gt=0, description="Tokens per chunk of the scan; changes speed and rounding, not meaning."
    )
    # What the scan's Triton kernels take; None: not known before they run.
    scan_limits: ClassVar[ScanLimits | None] = None

    @abstractmethod
    def heads(self) -> int:
        """Heads of the recurrence, each with a state [key_dim, value_dim]."""

    @abstractmethod
    def key_dim(self) -> int:
        """Rows of a head's state."""

    @abstractmethod
    def value_dim(self) -> int:
        """Columns of a head's state."""

    def state_shape(self) -> tuple[int, int]:
        """Rows and columns of a head's state, with those for sums."""
        return self.key_dim(), self.value_dim()

    def lookback(self) -> tuple[int, str]:
        """What the convolution reads."""
        return max(0, self.conv_kernel - 1), "conv_kernel"

    def scan(self) -> tuple[ScanLimits, int, tuple[int, int]] | None:
        """As the limits of its kernels say."""
        return None if self.scan_limits is None else (self.scan_limits, self.chunk_size, self.state_shape())


class HeadOptions(LinearOptions):
    """What every mixer with query, key and value heads can choose."""

    num_heads: int = Field(gt=0, description="Heads of the recurrence; independent of hidden_size.")
    head_dim: int = Field(64, gt=0, description="Channels of a query and key head.")
    value_head_dim: int | None = Field(None, gt=0, description="Channels of a value head; null: head_dim.")

    def heads(self) -> int:
        """num_heads."""
        return self.num_heads

    def key_dim(self) -> int:
        """head_dim."""
        return self.head_dim

    def value_dim(self) -> int:
        """Channels of a value head."""
        return self.value_head_dim or self.head_dim

    def cut_evenly(self) -> dict[Axis, dict[str, int]]:
        """Heads."""
        return {"tensor": {"num_heads": self.num_heads}}


class DeltaNetOptions(HeadOptions):
    """The delta rule (Yang et al. 2024, arXiv 2406.06484): each token overwrites what its key reads."""

    conv_kernel: Literal[0, 2, 3, 4] = Field(4, description="Width of the causal convolution over q, k and v; 0: none.")
    num_key_heads: int | None = Field(
        None,
        gt=0,
        description="Query and key heads, each shared by num_heads / num_key_heads value heads; null: num_heads.",
    )
    allow_negative_eigenvalues: bool = Field(
        False, description="beta in (0, 2) and not (0, 1), so that a state may change sign (arXiv 2411.12537)."
    )

    scan_limits: ClassVar[ScanLimits | None] = DELTA_LIMITS

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        """Value heads share key heads evenly."""
        if self.num_heads % self.key_heads():
            yield "num_key_heads", f"must divide num_heads={self.num_heads}; use a divisor of it"

    def key_heads(self) -> int:
        """Query and key heads."""
        return self.num_key_heads or self.num_heads

    def cut_or_copied(self) -> dict[str, int]:
        """Key heads may be fewer than tensor ranks."""
        return {"num_key_heads": self.key_heads()}


class GatedDeltaNetOptions(DeltaNetOptions):
    """The gated delta rule (Yang et al. 2024, arXiv 2412.06464), as in Qwen3-Next; letter `G`."""

    head_norm_epsilon: float | None = Field(
        None, gt=0, description="Epsilon of the norm of each head's output; null: norm_epsilon (OLMo Hybrid has 1e-5)."
    )


class DeltaProductOptions(DeltaNetOptions):
    """Several delta rules per token (Siems et al. 2025, arXiv 2502.10297); letter `P`."""

    num_steps: int = Field(2, ge=1, le=8, description="Delta rules per token, each with its own key, value and beta.")
    decay: bool = Field(True, description="Forget by a gate before the first of them.")


class VectorGateOptions(HeadOptions):
    """What every mixer with a decay a key channel can choose."""

    scan_limits: ClassVar[ScanLimits | None] = VECTOR_GATE_LIMITS

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        """Decays are summed in halves of halves of a chunk."""
        if self.chunk_size & (self.chunk_size - 1):
            yield "chunk_size", "must be a power of two with a decay a key channel; use 16, 32 or 64"


class Hgrn2Options(VectorGateOptions):
    """HGRN2 (Qin et al. 2024, arXiv 2404.07904): a forget gate per key channel, and what it forgets is the key; letter `H`."""


class ChannelDeltaOptions(VectorGateOptions):
    """What every delta rule with a decay a key channel can choose."""

    conv_kernel: Literal[0, 2, 3, 4] = Field(4, description="Width of the causal convolution over q, k and v; 0: none.")
    gate_rank: int | None = Field(
        None, gt=0, description="Inner width of the low-rank projections of decay and output gate; null: head_dim."
    )
    scan_limits: ClassVar[ScanLimits | None] = VECTOR_DELTA_LIMITS

    def rank(self) -> int:
        """Inside of the low-rank projections."""
        return self.gate_rank or self.head_dim


class KdaOptions(ChannelDeltaOptions):
    """Kimi Delta Attention (Kimi Team 2025, arXiv 2510.26692): the delta rule with a decay per key channel; letter `K`."""

    gates: Literal["low_rank", "full"] = Field(
        "low_rank", description="Projections of decay and output gate: two thin matrices each, or a whole one (Ling 3)."
    )
    decay_floor: float | None = Field(
        None,
        lt=0,
        description="Logarithm of the strongest decay, which a sigmoid approaches (Ling 3: -5); null: a softplus without bound.",
    )
    allow_negative_eigenvalues: bool = Field(
        False, description="beta in (0, 2) and not (0, 1), so that a state may change sign (arXiv 2411.12537)."
    )

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        """A rank is that of thin matrices."""
        yield from super().broken_rules()
        if self.gates == "full" and self.gate_rank is not None:
            yield "gate_rank", "is only read with gates: low_rank; remove it, or use that"


class ShortConvOptions(MixerOptions):
    """Gated short convolution of LFM2 (Liquid AI 2025, arXiv 2511.23404), as wide as the residual stream; letter `C`."""

    conv_kernel: Literal[2, 3, 4] = Field(3, description="Width of the causal depthwise convolution between two gates.")

    def lookback(self) -> tuple[int, str]:
        """What the convolution reads."""
        return self.conv_kernel - 1, "conv_kernel"
