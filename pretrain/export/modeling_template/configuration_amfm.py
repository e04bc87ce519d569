"""Configuration of an amfm hybrid model: a pattern of M Mamba2, * attention, E experts, - feed-forward, other mixers."""

from __future__ import annotations

import copy
import re
from typing import Any, ClassVar

from transformers import PretrainedConfig

# Of these files and the names of weights. Files of an export without a number multiply the loss by the pieces of gradient
# accumulation and let packed documents see each other.
MODELING_VERSION = 2
CORE_SYMBOLS = {"mamba": "M", "attention": "*", "moe": "E", "feed_forward": "-"}


class AmfmConfig(PretrainedConfig):
    """Sizes and choices of each block kind, and constant factors; a section is None if the pattern lacks its letter.

    `multipliers` scale the embedding, each block's output before it joins the stream (`residual`), and the logits.

    `mixers` has the options of other sequence mixers by name; the pattern has their letters or `{name}`.
    """

    model_type = "amfm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]

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
        norm_kind: str = "rmsnorm",
        norm_placement: str = "before",
        norms_after: list[int] | None = None,
        attention_residuals: dict[str, Any] | None = None,
        hyper_connections: dict[str, Any] | None = None,
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
        self.norm_kind = norm_kind
        self.norm_placement, self.norms_after = norm_placement, norms_after or []
        self.attention_residuals, self.hyper_connections = attention_residuals, hyper_connections
        # Exports of earlier versions have none.
        self.multipliers = {"embedding": 1.0, "residual": 1.0, "logits": 1.0} | (multipliers or {})
        self.modeling_version = MODELING_VERSION
        kwargs["num_hidden_layers"] = len(self.letters())
        # Programs ask every model for them; of a pattern without attention they are those of its first mixer with heads.
        sections = [attention, mamba, *self.mixers.values()]
        heads = next((section for section in sections if section and section.get("num_heads")), {"num_heads": 1})
        kwargs.setdefault("num_attention_heads", heads["num_heads"])
        kwargs.setdefault("num_key_value_heads", heads.get("num_kv_heads") or kwargs["num_attention_heads"])
        kwargs.pop("modeling_version", None)
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read config.json. Raises ValueError for one of an earlier version, whose weights have other names."""
        version = config_dict.get("modeling_version", 1)
        if config_dict.get("model_type") == cls.model_type and version != MODELING_VERSION:
            raise ValueError(
                f"config.json is of version {version} of amfm's modeling files, and these files are version {MODELING_VERSION}: "
                "names of weights differ. Keep the files that were exported together, or `amfm import` the folder and export it "
                "again"
            )
        return super().from_dict(config_dict, **kwargs)

    def letters(self) -> list[str]:
        """Split the pattern into its blocks, in order, by letter, `{name}` or `(M&*)` of mixers side by side."""
        return re.findall(r"\([^)]*\)|\{[a-z0-9_]+\}|.", self.pattern)

    def mixer_symbols(self) -> list[str]:
        """List the mixers of all blocks, those side by side one after the other; of a variant, its kind's."""
        return [self.symbol_of(symbol) for letter in self.letters() for symbol in letter.strip("()").split("&")]

    def symbol_of(self, symbol: str) -> str:
        """The symbol of the kind of a block: that of its kind for a variant, whose options name it as `of`."""
        kind = self.mixers.get(symbol.strip("{}"), {}).get("of")
        return symbol if kind is None else CORE_SYMBOLS.get(kind, f"{{{kind}}}")

    def of_block(self, symbol: str) -> AmfmConfig:
        """This configuration with the options of a variant, for a symbol of one, as those of its kind."""
        options = self.mixers.get(symbol.strip("{}"), {})
        kind = options.get("of")
        if kind is None:
            return self
        own = copy.copy(self)
        if kind in CORE_SYMBOLS:
            setattr(own, kind, options)
        else:
            own.mixers = {**self.mixers, kind: options}
        return own

    def sections_of(self, kind: str) -> list[dict[str, Any]]:
        """The options of a kind by name and of its variants."""
        own = getattr(self, kind, None) or self.mixers.get(kind)
        return [*([own] if own else []), *(each for each in self.mixers.values() if each.get("of") == kind)]
