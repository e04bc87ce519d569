"""The options of the mixers of this package; read without torch."""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt
from typing import ClassVar, Literal

from pydantic import Field

from amfm.kernels.common.limits import DECAY_LIMITS, DELTA_LIMITS, VECTOR_DELTA_LIMITS, ScanLimits
from amfm.model.config.key_mixer_options import SharedKeyOptions
from amfm.model.config.mixer_options import ChannelDeltaOptions, HeadOptions, LinearOptions, VectorGateOptions
from amfm.model.config.options import QK_NORM_AND_CLIP, Axis, MixerOptions, OutputGate, must_divide

DIAG_LIMITS = ScanLimits((16,), 16)  # of the kernels in diag_scan


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


class GlaOptions(VectorGateOptions):
    """Gated linear attention (Yang et al. 2023, arXiv 2312.06635): a decay per key channel."""

    gate_rank: int = Field(16, gt=0, description="Inner width of the low-rank projection that computes the decays.")


class LightNetOptions(VectorGateOptions):
    """LightNet (Qin et al. 2024, arXiv 2405.21022): keys are shares of a running softmax, which decays what came before."""

    gate_rank: int = Field(16, gt=0, description="Inner width of the low-rank output gate.")


class Gdn2Options(ChannelDeltaOptions):
    """Gated DeltaNet-2: Kimi Delta Attention with a gate per key channel that erases and one per value channel that writes."""


class CombaOptions(HeadOptions):
    """Comba (Hu et al. 2025, arXiv 2506.02475): Gated DeltaNet with a weaker feedback and a corrected query."""

    conv_kernel: Literal[0, 2, 3, 4] = Field(4, description="Width of the causal convolution over q, k and v; 0: none.")
    correction: float = Field(
        1.0, ge=0, description="First value of D, by which keys are taken from queries; 0.02 is better in small models."
    )
    scan_limits: ClassVar[ScanLimits | None] = DELTA_LIMITS
    allow_negative_eigenvalues: ClassVar[bool] = False

    def key_heads(self) -> int:
        """As many as value heads."""
        return self.num_heads


class MesaOptions(HeadOptions):
    """MesaNet (von Oswald et al. 2025, arXiv 2506.05233): reads as ridge regression from keys to values, solved at each token."""

    conv_kernel: Literal[0, 2, 3, 4] = Field(4, description="Width of the causal convolution over q and k; 0: none.")
    num_iterations: int = Field(
        30,
        gt=0,
        description="Iterations of the solver; each costs a scan of head_dim x head_dim, and more than head_dim change nothing.",
    )
    least_ridge: float = Field(0.25, gt=0, description="Lower bound of lambda, the ridge of each key channel.")
    scan_limits: ClassVar[ScanLimits | None] = DECAY_LIMITS

    def state_shape(self) -> tuple[int, int]:
        """Keys by keys and by values."""
        return self.key_dim(), self.key_dim() + self.value_dim()


class FeatureMapOptions(HeadOptions):
    """What mixers that forget nothing can choose: order comes from rotary positions, or from elsewhere in the model."""

    positions: Literal["none", "rope_before", "rope_after"] = Field(
        "none",
        description="Rotary positions, which restart at documents: `rope_before` the features, which keeps weights positive, or `rope_after` them, which makes weights exact functions of the distance (only `transnormer`).",
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


class MalaOptions(FeatureMapOptions):
    """Magnitude-aware linear attention (Fan et al. 2025, arXiv 2507.00698); experimental in language models."""

    def state_shape(self) -> tuple[int, int]:
        """A row and a column for the sums."""
        return self.key_dim() + 1, self.value_dim() + 1


class PlstmOptions(HeadOptions):
    """pLSTM along a line (Poeppel et al. 2025, arXiv 2506.11997): source, transition and mark gates."""

    scan_limits: ClassVar[ScanLimits | None] = DECAY_LIMITS


class LogLinearOptions(MixerOptions):
    """Log-linear Mamba2 (Guo et al. 2025, arXiv 2506.04761): a state for each power of two of the distance."""

    num_heads: int = Field(
        gt=0, description="Heads of the recurrence; num_heads x head_dim is usually twice hidden_size."
    )
    head_dim: int = Field(64, gt=0, description="Channels of x per head.")
    state_size: int = Field(128, gt=0, description="State numbers per channel of each level.")
    num_groups: int = Field(1, gt=0, description="Groups of heads that share B and C.")
    max_tokens: int = Field(
        16_384, gt=1, description="Longest document that is seen whole, a power of two; a longer one starts over there."
    )
    conv_kernel: Literal[0, 2, 3, 4] = Field(4, description="Width of the causal convolution over x, B and C; 0: none.")
    chunk_size: int = Field(
        64, gt=0, description="Tokens per chunk of the scans; changes speed and rounding, not meaning."
    )

    def num_levels(self) -> int:
        """Levels of a token's weights: itself, and a power of two each."""
        return self.max_tokens.bit_length()

    def heads(self) -> int:
        """num_heads."""
        return self.num_heads

    def key_dim(self) -> int:
        """state_size."""
        return self.state_size

    def value_dim(self) -> int:
        """head_dim."""
        return self.head_dim

    def state_shape(self) -> tuple[int, int]:
        """A matrix for each level above 0, one below the other."""
        return (self.num_levels() - 1) * self.state_size, self.head_dim

    def lookback(self) -> tuple[int, str]:
        """What the convolution reads."""
        return max(0, self.conv_kernel - 1), "conv_kernel"

    def scan(self) -> tuple[ScanLimits, int, tuple[int, int]] | None:
        """A level's."""
        return DECAY_LIMITS, self.chunk_size, (self.state_size, self.head_dim)

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        """Levels are powers of two, and groups have equally many heads."""
        if self.max_tokens & (self.max_tokens - 1):
            yield "max_tokens", f"must be a power of two; use {1 << self.max_tokens.bit_length()}"
        yield from must_divide("num_groups", self.num_groups, "num_heads", self.num_heads)

    def cut_evenly(self) -> dict[Axis, dict[str, int]]:
        """Heads."""
        return {"tensor": {"num_heads": self.num_heads}}

    def cut_or_copied(self) -> dict[str, int]:
        """Groups may be fewer than tensor ranks."""
        return {"num_groups": self.num_groups}


class FoxOptions(SharedKeyOptions):
    """Forgetting attention (Lin et al. 2025, arXiv 2503.02130): softmax attention whose scores fade by forget gates."""

    head_dim: int = Field(64, gt=0, description="Channels per head.")
    qk_norm: bool = Field(False, description="RMSNorm over each query and key head.")
    gate: OutputGate = Field(
        "none", description="Sigmoid of the input times each head's output: one gate per channel or per head."
    )

    def qk_clip(self) -> str:
        """Its log-sum-exps have sums of forget gates in them, which queries and keys do not bound."""
        return QK_NORM_AND_CLIP if self.qk_norm else "adds sums of forget gates to its scores, which it cannot scale"


class Mamba1Options(LinearOptions):
    """The original Mamba (Gu and Dao 2023, arXiv 2312.00752): a decay of each state number (S6)."""

    conv_kernel: Literal[0, 2, 3, 4] = Field(4, description="Width of the causal convolution over x; 0: none.")
    inner_size: int = Field(gt=0, description="Channels of the scan; usually twice hidden_size.")
    state_size: int = Field(16, gt=0, description="State values per channel.")
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
    state_size: int = Field(128, gt=0, description="State values per channel; a multiple of 4.")
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


class Rwkv7Options(MixerOptions):
    """RWKV-7's time mixing (Peng et al. 2025, arXiv 2503.14456), without values of the first block in later ones."""

    num_heads: int = Field(gt=0, description="Heads of the recurrence; independent of hidden_size.")
    head_dim: int = Field(64, gt=0, description="Channels of a head, of keys and of values.")
    gate_rank: int | None = Field(
        None, gt=0, description="Inner width of the low-rank projections of decay, rate and gate; null: head_dim."
    )
    chunk_size: int = Field(
        64, gt=0, description="Steps per chunk of the scan, two per token; changes speed and rounding, not meaning."
    )
    conv_kernel: ClassVar[int] = 0

    def rank(self) -> int:
        """Inside of the low-rank projections."""
        return self.gate_rank or self.head_dim

    def heads(self) -> int:
        """num_heads."""
        return self.num_heads

    def key_dim(self) -> int:
        """head_dim."""
        return self.head_dim

    def value_dim(self) -> int:
        """head_dim."""
        return self.head_dim

    def state_shape(self) -> tuple[int, int]:
        """Keys by values."""
        return self.head_dim, self.head_dim

    def scan(self) -> tuple[ScanLimits, int, tuple[int, int]] | None:
        """That of a delta rule with a decay per key channel."""
        return VECTOR_DELTA_LIMITS, self.chunk_size, self.state_shape()

    def cut_evenly(self) -> dict[Axis, dict[str, int]]:
        """Heads."""
        return {"tensor": {"num_heads": self.num_heads}}

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        """Decays are summed in halves of halves of a chunk."""
        if self.chunk_size & (self.chunk_size - 1):
            yield "chunk_size", "must be a power of two with a decay a key channel; use 16, 32 or 64"


class MomOptions(MixerOptions):
    """Mixture of memories (Du et al. 2025, arXiv 2502.13685): a linear mixer with several states and a router."""

    mixer: str = Field("gated_deltanet", description="The linear mixer inside; its own section has its options.")
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


class NgramMemoryOptions(MixerOptions):
    """N-gram memory (Cheng et al. 2026, arXiv 2601.07372): tables that hashes of the last tokens look up."""

    max_n: int = Field(3, ge=2, le=8, description="Tokens of the longest n-gram; tables are for 2 to this many.")
    num_heads: int = Field(8, gt=0, description="Tables for each length of n-grams, each with its own hash.")
    head_dim: int = Field(32, gt=0, description="Width of a row of a table.")
    table_size: int = Field(
        65_536,
        gt=1,
        description="Least rows of a table; each has another prime from here on, so that few n-grams meet in all.",
    )
    conv_kernel: int = Field(4, ge=2, description="Taps of the convolution after the look-up, max_n tokens apart.")

    def table_sizes(self) -> tuple[int, ...]:
        """Rows of each table, those of the shortest n-grams first."""
        sizes: list[int] = []
        number = self.table_size
        while len(sizes) < (self.max_n - 1) * self.num_heads:
            if all(number % part for part in range(2, isqrt(number) + 1)):
                sizes.append(number)
            number += 1
        return tuple(sizes)

    def cut_evenly(self) -> dict[Axis, dict[str, int]]:
        """The columns of all tables."""
        return {"tensor": {"head_dim": self.head_dim}}

    def rows_read(self) -> int:
        """One of each table."""
        return (self.max_n - 1) * self.num_heads

    def reach(self) -> int:
        """Tokens before one that the convolution reads."""
        return (self.conv_kernel - 1) * self.max_n

    def lookback(self) -> tuple[int, str]:
        """What the convolution reads, which is more than an n-gram."""
        return self.reach(), "conv_kernel"
