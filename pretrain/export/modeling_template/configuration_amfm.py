"""Configuration of an amfm hybrid model: a pattern of M Mamba2, * attention, E experts, - feed-forward, other mixers."""

from __future__ import annotations

import re
from typing import Any

from transformers import PretrainedConfig


class AmfmConfig(PretrainedConfig):
    """Sizes and choices of each block kind, and constant factors; a section is None where the pattern lacks its letter.

    `multipliers` scale the embedding, each block's output before it joins the stream (`residual`), and the logits.

    `mixers` has the options of other sequence mixers by name; the pattern has their letters or `{name}`.
    """

    model_type = "amfm"

    def __init__(
        self,
        *,
        pattern: str = "M",
        vocab_size: int = 32000,
        hidden_size: int = 256,
        norm_epsilon: float = 1e-5,
        max_position_embeddings: int = 4096,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        mamba: dict[str, Any] | None = None,
        attention: dict[str, Any] | None = None,
        moe: dict[str, Any] | None = None,
        feed_forward: dict[str, Any] | None = None,
        mixers: dict[str, dict[str, Any]] | None = None,
        multipliers: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self.pattern = pattern
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.norm_epsilon = norm_epsilon
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.mamba = mamba
        self.attention = attention
        self.moe = moe
        self.feed_forward = feed_forward
        self.mixers = mixers or {}
        # Exports of earlier versions have none.
        self.multipliers = {"embedding": 1.0, "residual": 1.0, "logits": 1.0} | (multipliers or {})
        kwargs["num_hidden_layers"] = len(self.letters())
        super().__init__(**kwargs)

    def letters(self) -> list[str]:
        """Split the pattern into its blocks, in order, by letter or `{name}`."""
        return re.findall(r"\{[a-z0-9_]+\}|.", self.pattern)
