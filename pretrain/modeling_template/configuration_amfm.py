"""Configuration of an amfm hybrid model: blocks of a pattern (M Mamba2, * attention, E experts, - feed-forward)."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class AmfmConfig(PretrainedConfig):
    """Sizes and choices of each block kind; a section is None where the pattern lacks its letter."""

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
        kwargs["num_hidden_layers"] = len(pattern)
        super().__init__(**kwargs)
