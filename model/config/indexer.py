"""The options of the indexer that chooses the keys of sparse attention. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

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
