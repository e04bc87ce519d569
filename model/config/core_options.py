"""The options of attention, Mamba2 and feed-forwards. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from amfm.kernels.common.limits import DECAY_LIMITS, ScanLimits, refuse_native_sizes
from amfm.model.config.key_mixer_options import IndexerConfig, keys_and_scores
from amfm.model.config.options import (
    QK_NORM_AND_CLIP,
    Axis,
    MixerOptions,
    OutputGate,
    Prunable,
    channel_dims,
    must_divide,
)
from amfm.model.config.rope import RopeConfig
from amfm.model.config.structure import Activation, FeedForwardPart, LinearKind, Structure, broken_limit


class FeedForwardConfig(MixerOptions):
    """Dense feed-forward; letter `-` (Hunyuan: `D`)."""

    hidden_size: int = Field(gt=0, description="Inner width.")
    activation: Activation = Field(
        "squared_relu",
        description="`swiglu` is gated and has a third matrix, `swiglu_oai` is that of gpt-oss, gate sigmoid(1.702 gate) (up + 1), `geglu` that of Gemma, tanh's form of GELU(gate) up, and `geglu_erf` the exact form; `squared_relu`, `gelu` (exact) and `gelu_tanh` are not gated.",
    )
    activation_limit: float | None = Field(
        None,
        gt=0,
        description="Gate at most this, and up between its negative and this, before they are multiplied: 7 in gpt-oss, 10 in DeepSeek-V4; null: no limit. Only for gated activations.",
    )
    bias: bool = Field(False, description="Biases of both matrices, of dense ones.")
    linear_kind: LinearKind = Field(
        "dense",
        description="Form of the matrices: products of two factors, `lowrank` (linear_rank), `blockshuffle` (linear_blocks) or `blockdense` (both); docs/structure.md.",
    )
    linear_rank: int | None = Field(
        None, gt=0, description="Values per token between the factors; lowrank, blockdense."
    )
    linear_blocks: int | None = Field(
        None,
        ge=2,
        description="Blocks of a block-diagonal factor; blockshuffle, blockdense. Tensor ranks must divide it.",
    )

    def structure(self) -> Structure:
        """Form of the matrices."""
        return Structure(self.linear_kind, self.linear_rank, self.linear_blocks)

    def feed_forwards(self) -> tuple[FeedForwardPart, ...]:
        """Itself."""
        return (FeedForwardPart("", "", self.structure(), self.hidden_size, self.activation),)

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        """Only gated units have a limit, and only dense matrices biases."""
        yield from broken_limit(self.activation, self.activation_limit)
        if self.bias and self.linear_kind != "dense":
            yield "bias", f"goes with dense matrices, not with linear_kind={self.linear_kind}; remove one of the two"

    def cut_evenly(self) -> dict[Axis, dict[str, int]]:
        """Channels, and blocks of factors."""
        blocks = {} if self.linear_blocks is None else {"linear_blocks": self.linear_blocks}
        return {"tensor": {"hidden_size": self.hidden_size} | blocks}

    def prunable(self, groups: str) -> Prunable | None:
        """Inner channels."""
        if groups != "channels":
            return None
        biases = {"up_proj.bias": (0, self.hidden_size, 1)} if self.bias else {}
        return Prunable({"hidden_size": 1}, self.hidden_size, channel_dims(self.hidden_size) | biases)


class Mamba2Config(MixerOptions):
    """Mamba2 mixer (Dao and Gu 2024, arXiv 2405.21060); letter `M`."""

    num_heads: int = Field(gt=0, description="Heads of the recurrence; independent of hidden_size.")
    head_dim: int = Field(64, gt=0, description="Channels per head; inner width = num_heads * head_dim.")
    state_size: int = Field(128, gt=0, description="State values per channel (N).")
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
        "Better true if train.recompute makes the block again anyway. Triton only: torch always keeps them.",
    )
    a_init_min: float = Field(
        1.0, gt=0, description="-A starts uniform in [a_init_min, a_init_max], one value per head."
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

    def refuse_native(self) -> str | None:
        """As the limits of its C code say."""
        return refuse_native_sizes(self.chunk_size, self.state_size, self.head_dim)

    def recurrence_flops(self) -> int:
        """Of the recurrence itself, whatever the chunk: a state number per token takes decay, times B, add, times C, add."""
        # Then D x on each channel.
        return 5 * self.inner_size() * self.state_size + 2 * self.inner_size()


class AttentionConfig(MixerOptions):
    """Causal grouped-query attention; letter `*` (Hunyuan: `A`)."""

    num_heads: int = Field(gt=0, description="Query heads.")
    num_kv_heads: int = Field(gt=0, description="Key and value heads; must divide num_heads.")
    head_dim: int = Field(gt=0, description="Channels per head; independent of hidden_size.")
    qk_norm: bool | Literal["wide"] = Field(
        False,
        description="RMSNorm over each query and key head, as in Qwen3; `wide`: over all heads together, as in OLMo and MiniMax-M2.",
    )
    positions: Literal["none", "rope"] = Field("none", description="`none`: order comes only from the Mamba2 layers.")
    rope: RopeConfig = Field(RopeConfig(), description="Only read with positions: rope.")
    softmax_scale: float | None = Field(
        None, gt=0, description="Default: head_dim ** -0.5. Granite's attention_multiplier."
    )
    gate: OutputGate = Field(
        "none",
        description="Sigmoid of the input times each head's output before o_proj: one gate per channel (`element`, as in Qwen3-Next) or per head.",
    )

    bias: bool | Literal["qkv"] = Field(
        False,
        description="Biases on the projections of queries, keys, values and output, as in gpt-oss; `qkv`: of all but the output, as in Qwen2.",
    )
    sinks: bool = Field(
        False,
        description="One learned logit per head in the softmax denominator, without a value vector, as in gpt-oss.",
    )
    indexer: IndexerConfig | None = Field(None, description="Chooses the keys that a token attends to; null: all.")

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        """Query heads share key-value heads evenly, and rotary positions rotate something."""
        yield from must_divide("num_kv_heads", self.num_kv_heads, "model.attention.num_heads", self.num_heads)
        if self.positions == "rope":
            for field, rule in self.rope.broken_rules(self.head_dim):
                yield f"rope.{field}", rule
        elif self.rope != RopeConfig():
            rule = "is set but model.attention.positions=none never reads it"
            yield "rope", f"{rule}; use positions: rope, or remove the rope section"
        if self.indexer is not None:
            yield from self.indexer.broken_rules(is_rotary=self.positions == "rope", sinks=self.sinks)

    def auxiliary_names(self) -> tuple[str, ...]:
        """The loss of its indexer."""
        return () if self.indexer is None else ("indexer",)

    def cut_evenly(self) -> dict[Axis, dict[str, int]]:
        """Query heads."""
        return {"tensor": {"num_heads": self.num_heads}}

    def cut_or_copied(self) -> dict[str, int]:
        """Key-value heads may be fewer than tensor ranks."""
        return {"num_kv_heads": self.num_kv_heads}

    def qk_clip(self) -> str:
        """By its queries, unless they are normed."""
        return QK_NORM_AND_CLIP if self.qk_norm else ""

    def sequence_flops(self, sequence_length: int) -> float:
        """Queries with keys and weights with values, over the (T + 1) / 2 keys that a token sees on average; an indexer's scores."""
        keys, scores = keys_and_scores(self.indexer, sequence_length)
        # Two products, of 2 operations per channel and key each.
        return 2 * 2 * keys * self.num_heads * self.head_dim + scores

    def prunable(self, groups: str) -> Prunable | None:
        """A key-value head with its query heads: rows of q, k, v and the gates, numbers of their biases, columns of o."""
        if groups != "heads":
            return None
        queries = self.num_heads // self.num_kv_heads
        rows, keys, count = queries * self.head_dim, self.head_dim, self.num_kv_heads
        dims = {
            "q_proj.weight": (0, count * rows, rows),
            "k_proj.weight": (0, count * keys, keys),
            "v_proj.weight": (0, count * keys, keys),
            "o_proj.weight": (1, count * rows, rows),
        }
        if self.bias:
            dims |= {f"{name}_proj.bias": dims[f"{name}_proj.weight"] for name in "qkv"}
        if self.sinks:
            dims["sinks"] = (0, count * queries, queries)
        if self.gate != "none":
            gates = rows if self.gate == "element" else queries
            dims["g_proj.weight"] = (0, count * gates, gates)
        rule = ("does not go with model.attention.qk_norm=wide, whose mean is over all heads", "use true or false")
        refused = (rule,) if self.qk_norm == "wide" else ()
        return Prunable({"num_kv_heads": 1, "num_heads": queries}, count, dims, refused=refused)
