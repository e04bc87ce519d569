"""The options of attention. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from amfm.model.config.indexer import IndexerConfig, keys_and_scores
from amfm.model.config.options import (
    QK_NORM_AND_CLIP,
    Axis,
    MixerOptions,
    OutputGate,
    Prunable,
    must_divide,
)
from amfm.model.config.rope import RopeConfig


class AttentionConfig(MixerOptions):
    """Causal grouped-query attention; letter `*` (Hunyuan: `A`)."""

    num_heads: int = Field(gt=0, description="Query heads.")
    num_kv_heads: int = Field(gt=0, description="Key and value heads; must divide num_heads.")
    head_dim: int = Field(gt=0, description="Channels per head; independent of hidden_size.")
    qk_norm: bool = Field(
        False, description="RMSNorm over each query and key head (no native transformers class holds it)."
    )
    positions: Literal["none", "rope"] = Field("none", description="`none`: order comes from the Mamba2 layers alone.")
    rope: RopeConfig = Field(RopeConfig(), description="Only read with positions: rope.")
    softmax_scale: float | None = Field(
        None, gt=0, description="Default: head_dim ** -0.5. Granite's attention_multiplier."
    )
    gate: OutputGate = Field(
        "none",
        description="Sigmoid of the input times each head's output before o_proj: one gate per channel (`element`, as in Qwen3-Next) or per head.",
    )

    bias: bool = Field(
        False, description="Biases on the projections of queries, keys, values and output, as in gpt-oss."
    )
    sinks: bool = Field(
        False,
        description="One learned score per head that takes a share of every query's attention and has no value, as in gpt-oss.",
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
        return Prunable({"num_kv_heads": 1, "num_heads": queries}, count, dims)
