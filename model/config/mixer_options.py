"""The options of our mixers: one frozen section each. No torch here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from amfm.kernels.common.limits import (
    DECAY_LIMITS,
    DELTA_LIMITS,
    DIAG_LIMITS,
    VECTOR_DELTA_LIMITS,
    VECTOR_GATE_LIMITS,
    ScanLimits,
)
from amfm.model.config.options import Axis, MixerOptions, must_divide


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


class RetentionOptions(HeadOptions):
    """Retention (Sun et al. 2023, arXiv 2307.08621): a constant decay per head, rotary positions, output gate."""

    rope_theta: float = Field(10_000.0, gt=1, description="Base of the rotary frequencies of queries and keys.")
    scan_limits: ClassVar[ScanLimits | None] = DECAY_LIMITS

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        """Channels are rotated in pairs."""
        if self.head_dim % 2:
            yield "head_dim", "must be even, because channels are rotated in pairs; add one"


class LightningOptions(HeadOptions):
    """Lightning attention (Qin et al. 2024, arXiv 2401.04658): a constant decay per head that weakens with depth."""

    scan_limits: ClassVar[ScanLimits | None] = DECAY_LIMITS


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


class GlaOptions(VectorGateOptions):
    """Gated linear attention (Yang et al. 2023, arXiv 2312.06635): a decay per key channel."""

    gate_rank: int = Field(16, gt=0, description="Inner width of the low-rank projection that gives the decays.")


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

    allow_negative_eigenvalues: bool = Field(
        False, description="beta in (0, 2) and not (0, 1), so that a state may change sign (arXiv 2411.12537)."
    )


class Gdn2Options(ChannelDeltaOptions):
    """Gated DeltaNet-2: Kimi Delta Attention with a gate per key channel that erases and one per value channel that writes."""


class FeatureMapOptions(HeadOptions):
    """What mixers that forget nothing can choose: order comes from rotary positions, or from elsewhere in the model."""

    positions: Literal["none", "rope_before", "rope_after"] = Field(
        "none",
        description="Rotary positions, which restart at documents: `rope_before` the features, which keeps weights positive, or `rope_after` them, which makes weights exact functions of the distance (`transnormer` alone).",
    )
    rope_theta: float = Field(
        10_000.0, gt=1, description="Base of the rotary frequencies; only read with rotary positions."
    )
    scan_limits: ClassVar[ScanLimits | None] = DECAY_LIMITS
    divides: ClassVar[bool] = True  # by the sum of its weights, which must be positive

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        """Channels are rotated in pairs, and a sum of weights of both signs is not a denominator."""
        if self.positions == "none":
            if self.rope_theta != 10_000.0:
                yield "rope_theta", "is only read with rotary positions; set positions, or remove it"
            return
        if self.head_dim % 2:
            yield "head_dim", f"must be even with positions: {self.positions}; add one, or use positions: none"
        if self.positions == "rope_after" and self.divides:
            yield "positions", "makes weights negative, and this mixer divides by their sum; use rope_before"


class TransNormerOptions(FeatureMapOptions):
    """TransNormer (Qin et al. 2022, arXiv 2210.10340): linear attention with a norm instead of a division."""

    divides: ClassVar[bool] = False


class HedgehogOptions(FeatureMapOptions):
    """Hedgehog (Zhang et al. 2024, arXiv 2402.04347): linear attention with learned softmax features."""

    def state_shape(self) -> tuple[int, int]:
        """Twice the features, and the sum of weights next to the values."""
        return 2 * self.key_dim(), self.value_dim() + 1


class PlstmOptions(HeadOptions):
    """pLSTM along a line (Poeppel et al. 2025, arXiv 2506.11997): source, transition and mark gates."""

    scan_limits: ClassVar[ScanLimits | None] = DECAY_LIMITS


class Mamba1Options(LinearOptions):
    """The original Mamba (Gu and Dao 2023, arXiv 2312.00752): a decay of each state number (S6)."""

    conv_kernel: Literal[0, 2, 3, 4] = Field(4, description="Width of the causal convolution over x; 0: none.")
    inner_size: int = Field(gt=0, description="Channels of the scan; usually twice hidden_size.")
    state_size: int = Field(16, gt=0, description="State numbers per channel.")
    dt_rank: int | None = Field(
        None, gt=0, description="Inner width of the time step's projection; null: hidden_size / 16."
    )
    scan_limits: ClassVar[ScanLimits | None] = DIAG_LIMITS

    def heads(self) -> int:
        """Each channel."""
        return self.inner_size

    def key_dim(self) -> int:
        """state_size."""
        return self.state_size

    def value_dim(self) -> int:
        """One number."""
        return 1

    def cut_evenly(self) -> dict[Axis, dict[str, int]]:
        """Channels."""
        return {"tensor": {"inner_size": self.inner_size}}


class Mamba3Options(LinearOptions):
    """Mamba-3 with one input and output per head (Lahoti et al. 2026): Mamba2's recurrence, turned and of second order."""

    num_heads: int = Field(
        gt=0, description="Heads of the recurrence; num_heads x head_dim is usually twice hidden_size."
    )
    head_dim: int = Field(64, gt=0, description="Channels of x per head.")
    state_size: int = Field(128, gt=0, description="State numbers per channel; a multiple of 4.")
    num_groups: int = Field(1, gt=0, description="Groups of heads that share B and C, apart from their biases.")
    rotated: Literal["half", "all"] = Field(
        "half", description="Channels of B and C that are rotated: the first half, or all."
    )
    scan_limits: ClassVar[ScanLimits | None] = DECAY_LIMITS

    def heads(self) -> int:
        """num_heads."""
        return self.num_heads

    def key_dim(self) -> int:
        """state_size."""
        return self.state_size

    def value_dim(self) -> int:
        """head_dim."""
        return self.head_dim

    def num_angles(self) -> int:
        """Pairs of channels that turn."""
        return self.state_size // (4 if self.rotated == "half" else 2)

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        """Channels turn in pairs, and groups have equally many heads."""
        if self.state_size % 4:
            yield "state_size", "must be a multiple of 4, because channels are rotated in pairs; use 64 or 128"
        yield from must_divide("num_groups", self.num_groups, "num_heads", self.num_heads)

    def cut_evenly(self) -> dict[Axis, dict[str, int]]:
        """Heads."""
        return {"tensor": {"num_heads": self.num_heads}}

    def cut_or_copied(self) -> dict[str, int]:
        """Groups may be fewer than tensor ranks."""
        return {"num_groups": self.num_groups}


class ShortConvOptions(MixerOptions):
    """Gated short convolution of LFM2 (Liquid AI 2025, arXiv 2511.23404), as wide as the stream; letter `C`."""

    conv_kernel: Literal[2, 3, 4] = Field(3, description="Width of the causal depthwise convolution between two gates.")

    def lookback(self) -> tuple[int, str]:
        """What the convolution reads."""
        return self.conv_kernel - 1, "conv_kernel"


class LightNetOptions(VectorGateOptions):
    """LightNet (Qin et al. 2024, arXiv 2405.21022): keys are shares of a running softmax, which decays what came before."""

    gate_rank: int = Field(16, gt=0, description="Inner width of the low-rank output gate.")


class MalaOptions(FeatureMapOptions):
    """Magnitude-aware linear attention (Fan et al. 2025, arXiv 2507.00698); experimental in language models."""

    def state_shape(self) -> tuple[int, int]:
        """A row and a column for the sums."""
        return self.key_dim() + 1, self.value_dim() + 1


class MomOptions(MixerOptions):
    """Mixture of memories (Du et al. 2025, arXiv 2502.13685): a linear mixer with several states and a router."""

    mixer: str = Field("gated_deltanet", description="The linear mixer inside; its own section gives its options.")
    num_memories: int = Field(4, gt=1, description="States among which the router chooses.")
    top_k: int = Field(2, gt=0, description="States that a token writes and reads.")
    shared_memory: bool = Field(True, description="One more state, for all tokens.")
    balance_loss_weight: float = Field(
        0.01, ge=0, description="Balance over a micro-batch (Fedus et al. 2021, arXiv 2101.03961, section 2.2)."
    )

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        """A token chooses among the memories that there are."""
        if self.top_k > self.num_memories:
            yield "top_k", f"must be at most num_memories={self.num_memories}; lower it"

    def wraps(self) -> str:
        """The mixer inside."""
        return self.mixer

    def auxiliary_names(self) -> tuple[str, ...]:
        """Its balance, if that has a weight."""
        return ("memory_balance",) if self.balance_loss_weight else ()
