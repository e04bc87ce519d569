"""The options of mixers that keep keys of tokens, not a state: windows and latent attention. No torch here.

The options of the indexer that chooses the keys of sparse attention. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from amfm.model.config.options import QK_NORM_AND_CLIP, Axis, MixerOptions, OutputGate
from amfm.model.config.rope import MlaYarn, RopeConfig, YarnStretch
from amfm.model.config.section import Section

IndexerStage = Literal["warm_up", "sparse"]


class IndexerConfig(Section):
    """The indexer of DeepSeek sparse attention (arXiv 2512.02556): each token attends to the keys that it scores highest."""

    top_k: int = Field(gt=0, description="Keys that a token attends to, of its document and up to its own.")
    num_heads: int = Field(
        4, ge=4, description="Heads of its scores; of fewer, many scores are zero and the earliest keys are chosen."
    )
    head_dim: int = Field(64, gt=0, description="Channels of its query heads and of its one key head.")
    rope_fraction: float = Field(
        0.5, gt=0, le=1, description="Part of each of its heads that is rotated, if attention is rotary."
    )
    loss_weight: float = Field(
        1.0,
        gt=0,
        description="Of its divergence from the weights of attention, a mean over tokens; it trains nothing else.",
    )
    stage: IndexerStage = Field(
        "sparse",
        description="`warm_up`: attention is dense, and the indexer learns from all keys; `sparse`: attention to the chosen keys, from which it learns.",
    )

    def broken_rules(self, *, is_rotary: bool, sinks: bool) -> Iterator[tuple[str, str]]:
        """Channels are rotated in pairs, and only where attention rotates; no sinks."""
        rotated = self.head_dim * self.rope_fraction
        if not is_rotary and self.rope_fraction != 0.5:
            yield "indexer.rope_fraction", "is only read with positions: rope; remove it"
        if is_rotary and (rotated != int(rotated) or int(rotated) % 2):
            rule = f"of indexer.head_dim={self.head_dim} must rotate an even number of channels; change either"
            yield "indexer.rope_fraction", rule
        if sinks:
            yield "indexer", "chooses keys, and its sums have no sinks yet; leave one of the two out"


def keys_and_scores(indexer: IndexerConfig | None, sequence_length: int) -> tuple[float, float]:
    """Keys that a token attends to on average in a row of one document, and FLOPs per token of the indexer's scores.

    A score is a product per head, then relu, weight and sum. Those by which keys are chosen have no backward pass, so a third of
    them counts, and those of chosen keys, from which the indexer learns: training is three times as much.
    """
    seen = (sequence_length + 1) / 2
    if indexer is None:
        return seen, 0.0
    score = indexer.num_heads * (2 * indexer.head_dim + 2)
    if indexer.stage == "warm_up":
        return seen, seen * score
    top_k = min(indexer.top_k, sequence_length)
    read = top_k - top_k * (top_k - 1) / (2 * sequence_length)
    return read, (seen / 3 + read) * score


class SharedKeyOptions(MixerOptions):
    """The base of attention's options: query heads that share key and value heads evenly."""

    num_heads: int = Field(gt=0, description="Query heads.")
    num_kv_heads: int | None = Field(
        None, gt=0, description="Key and value heads; must divide num_heads. null: num_heads."
    )

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        """As many query heads for each key head."""
        if self.num_heads % self.kv_heads():
            yield "num_kv_heads", f"must divide num_heads={self.num_heads}; use a divisor of it"

    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_kv_heads or self.num_heads

    def cut_evenly(self) -> dict[Axis, dict[str, int]]:
        """Query heads."""
        return {"tensor": {"num_heads": self.num_heads}}

    def cut_or_copied(self) -> dict[str, int]:
        """Key and value heads may be fewer than tensor ranks."""
        return {"num_kv_heads": self.kv_heads()}


class WindowOptions(SharedKeyOptions):
    """Attention to the last few tokens (Beltagy et al. 2020, arXiv 2004.05150); letter `W`."""

    window: int = Field(gt=0, description="Keys that a token sees, including its own.")
    head_dim: int = Field(64, gt=0, description="Channels per head; even with positions: rope.")
    qk_norm: bool | Literal["wide"] = Field(
        False, description="RMSNorm over each query and key head; `wide`: over all heads together."
    )
    positions: Literal["none", "rope"] = Field(
        "rope", description="`rope`: rotary positions, which restart at documents."
    )
    rope_theta: float = Field(10_000.0, gt=1, description="Base of the rotary frequencies.")
    yarn: YarnStretch | None = Field(
        None,
        description="Rotary positions stretched as by model.attention.rope with scaling: yarn; null: not stretched.",
    )
    softmax_scale: float | None = Field(None, gt=0, description="Factor on scores; null: head_dim ** -0.5.")
    gate: OutputGate = Field(
        "none", description="Sigmoid of the input times each head's output: one gate per channel or per head."
    )

    bias: bool | Literal["qkv"] = Field(
        False,
        description="Biases on the projections of queries, keys, values and output, as in gpt-oss; `qkv`: of all but the output, as in Qwen2.",
    )
    sinks: bool = Field(
        False,
        description="One learned logit per head in the softmax denominator, without a value vector, as in gpt-oss.",
    )

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        """Channels are rotated in pairs, too."""
        yield from super().broken_rules()
        if self.positions == "rope" and self.head_dim % 2:
            yield "head_dim", "must be even with positions: rope; add one, or use positions: none"
        yield from _broken_yarn(self.yarn, self.positions)

    def rope(self) -> RopeConfig:
        """Its rotary positions as those of attention."""
        return RopeConfig(theta=self.rope_theta) if self.yarn is None else self.yarn.rope(self.rope_theta)

    def qk_clip(self) -> str:
        """By its queries, unless they are normed."""
        return QK_NORM_AND_CLIP if self.qk_norm else ""

    def lookback(self) -> tuple[int, str]:
        """What the window reads."""
        return self.window - 1, "window"


class MlaOptions(MixerOptions):
    """Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434): keys and values from one narrow vector; letter `+`."""

    num_heads: int = Field(gt=0, description="Heads.")
    latent_size: int = Field(512, gt=0, description="Width of the vector that keys and values are made of.")
    query_latent_size: int | None = Field(
        None, gt=0, description="Width of one that queries are made of (DeepSeek-V3: 1536); null: made of the input."
    )
    nope_head_dim: int = Field(128, gt=0, description="Channels of a query and key head without position.")
    rope_head_dim: int = Field(
        64, gt=0, description="Further channels, whose key all heads share; rotated with positions: rope."
    )
    value_head_dim: int = Field(128, gt=0, description="Channels of a value head.")
    positions: Literal["none", "rope"] = Field(
        "none",
        description="`none` as Kimi Linear; `rope` as DeepSeek-V3: rotary positions, which restart at documents.",
    )
    rope_theta: float = Field(10_000.0, gt=1, description="Base of the rotary frequencies.")
    yarn: MlaYarn | None = Field(
        None, description="Rotary positions stretched by YaRN, as in DeepSeek-V3; null: not stretched."
    )
    gate: OutputGate = Field(
        "none", description="Sigmoid of the input times each head's output: one gate per channel or per head."
    )
    latent_norm_epsilon: float = Field(
        1e-6, gt=0, description="Of the norms of latents; transformers' classes use 1e-6 whatever rms_norm_eps is."
    )

    sinks: bool = Field(
        False,
        description="One learned logit per head in the softmax denominator, without a value vector, as in gpt-oss.",
    )
    indexer: IndexerConfig | None = Field(
        None, description="Chooses the tokens whose latents a token attends to, as in DeepSeek-V3.2; null: all."
    )

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        """Channels are rotated in pairs."""
        if self.positions == "rope" and self.rope_head_dim % 2:
            yield "rope_head_dim", "must be even with positions: rope; add one, or use positions: none"
        yield from _broken_yarn(self.yarn, self.positions)
        if self.indexer is not None:
            yield from self.indexer.broken_rules(is_rotary=self.positions == "rope", sinks=self.sinks)

    def rope(self) -> RopeConfig:
        """Rotary positions of the channels that have one."""
        return RopeConfig(theta=self.rope_theta) if self.yarn is None else self.yarn.rope(self.rope_theta)

    def scale(self) -> float:
        """The factor on scores."""
        on_scores = 1.0 if self.yarn is None else self.yarn.on_scores()
        return (self.nope_head_dim + self.rope_head_dim) ** -0.5 * on_scores

    def auxiliary_names(self) -> tuple[str, ...]:
        """The loss of its indexer."""
        return () if self.indexer is None else ("indexer",)

    def qk_clip(self) -> str:
        """By queries and keys; the norms of latents come before the matrices of heads."""
        return ""

    def cut_evenly(self) -> dict[Axis, dict[str, int]]:
        """Heads."""
        return {"tensor": {"num_heads": self.num_heads}}


def _broken_yarn(yarn: YarnStretch | None, positions: str) -> Iterator[tuple[str, str]]:
    """What is set is read, and its ramp has a length."""
    if yarn is not None and positions == "none":
        yield "yarn.factor", "is only read with positions: rope; remove yarn"
    elif yarn is not None and yarn.beta_slow >= yarn.beta_fast:
        yield "yarn.beta_slow", f"must be under beta_fast={yarn.beta_fast}; use 1 and 32"
