"""A model's configuration: a pattern, a section for each kind of block (kinds.py), and what holds for the whole model.

The section of low-rank updates among which a router chooses. No torch here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from amfm.model.config.core_options import AttentionConfig, FeedForwardConfig, Mamba2Config
from amfm.model.config.key_mixer_options import IndexerStage
from amfm.model.config.kinds import ENTRY_POINTS, Kind, all_kinds, find_kind, kind_of, registered_kinds
from amfm.model.config.moe import MoeConfig
from amfm.model.config.old_names import use_current_names
from amfm.model.config.options import MixerOptions
from amfm.model.config.pattern import Pattern, parse_pattern
from amfm.model.config.plugins import PluginSections, list_packages, read_saved_sections, with_sections
from amfm.model.config.routers import RegisteredRouters
from amfm.model.config.section import Section
from amfm.model.config.streams import STREAMS, AttentionResidualsConfig, HyperConnectionsConfig, StreamConfig
from amfm.model.config.structure import DENSE
from amfm.model.config.variants import Variants

Projection = Literal["q", "k", "v", "o", "in", "out"]
BALANCE, SPECIALIZATION = "lora_balance", "lora_specialization"  # names of the losses


class LoraMixerConfig(Section):
    """Low-rank updates of projections, of which a router chooses some for each token; set by `amfm convert`."""

    num_experts: int = Field(ge=2, description="Updates of each projection.")
    top_k: int = Field(2, gt=0, description="Updates per token; at most num_experts.")
    rank: int = Field(8, gt=0, description="Rank of each update.")
    alpha: float = Field(16.0, gt=0, description="Updates count alpha / rank times.")
    targets: tuple[Projection, ...] = Field(
        ("q", "k", "v", "o"),
        min_length=1,
        description="Projections with updates: `q`, `k`, `v`, `o` of attention, `in` and `out` of Mamba2 and of linear mixers.",
    )
    balance_weight: float = Field(
        0.01, ge=0, description="Weight of the loss that balances the router, as lora_balance."
    )
    specialization_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the mean entropy of a token's routing probabilities, as lora_specialization: routing gets sharper, the more the routes of all are balanced.",
    )
    hard_from_step: int | None = Field(
        None,
        gt=0,
        description="Training steps in which all updates count, by the softmax of the router; then, and outside of training, the top_k do. None: the top_k from the first step.",
    )

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        """A token chooses among the updates that there are."""
        if self.top_k > self.num_experts:
            yield "top_k", f"is more than num_experts={self.num_experts}; lower it to at most that"

    def auxiliary_names(self) -> tuple[str, ...]:
        """The balance of the router and the sharpness of its choices, if these have a weight."""
        weights = {BALANCE: self.balance_weight, SPECIALIZATION: self.specialization_weight}
        return tuple(name for name, weight in weights.items() if weight)


class GuideConfig(Section):
    """Self-guided training of factored matrices (Wei et al. 2024, arXiv 2406.16450): adds a dense matrix to each, which fades out.

    y = alpha W x + (1 - alpha) second(first(x)); W begins as the product, and is gone when alpha is 0.
    """

    share: float = Field(
        0.5, gt=0, le=1, description="Of all steps in which the dense matrices fade, by half a cosine."
    )
    skip: bool = Field(
        False, description="In a share 1 - alpha of the steps, drawn by seed and step, leave the dense matrices out."
    )

    def last_step(self, total_steps: int) -> int:
        """Steps after which the dense matrices are gone, of so many."""
        return max(1, round(self.share * total_steps))

    def alpha(self, step: int, total_steps: int) -> float:
        """Weight of the dense matrices after `step` steps."""
        done = min(1.0, step / self.last_step(total_steps))
        return 0.0 if done == 1.0 else (1 + math.cos(math.pi * done)) / 2


class MultipliersConfig(Section):
    """Constant factors in the forward pass, as Granite 4 and Falcon-H1 train with; the factor on scores is attention.softmax_scale."""

    embedding: float = Field(1.0, gt=0, description="On the output of the embedding; not on a tied head.")
    residual: float = Field(1.0, gt=0, description="On the output that each block adds to the residual stream.")
    logits: float = Field(
        1.0, gt=0, description="On the logits (Granite: 1 / logits_scaling; Falcon-H1: lm_head_multiplier)."
    )


class MupConfig(Section):
    """Maximal update parametrization: rates found at a narrow width work at a wide one; docs/mup.md."""

    base_hidden_size: int = Field(
        gt=0, description="Width at which initializer_range and optimizer.learning_rate were found; hidden_size there."
    )


class MtpConfig(Section):
    """Multi-token prediction: what the MTP layers after `/` in the pattern learn (DeepSeek-V3, arXiv 2412.19437, section 2.2)."""

    loss_weight: float = Field(
        0.3, gt=0, description="Of the mean of the losses of all MTP layers; the main loss has 1."
    )
    shared: bool = Field(
        False, description="One module for all MTP layers, as Nemotron 3 Super and Ultra; else one for each."
    )
    detach: bool = Field(
        False, description="MTP layers pass no gradient to the main model: they are trained on a model as it is."
    )


@with_sections({name: (kind.options, f"Needed by {kind.symbol}.") for name, kind in registered_kinds().items()})
class RegisteredMixers(PluginSections):
    """Options of registered mixers, by name; needed by their letter or `{name}` in the pattern."""

    group: ClassVar[str] = ENTRY_POINTS
    packages: ClassVar[Mapping[str, str]] = list_packages(ENTRY_POINTS, Kind)


class ModelConfig(Section):
    """A hybrid decoder: embedding, blocks of the pattern, norm, head."""

    pattern: str = Field(
        min_length=1,
        description="Blocks in order: M Mamba2, * attention, E MoE, - dense; or Hunyuan's A, M, F, D; other mixers by symbol or `{name}`, several side by side as `(M&*)` (docs/mixers.md). `(MF)*8 AF` or `((ME)x8 *E)x7 ME` repeats, `|` cuts pipeline stages; `ME/*E/*E` has two MTP layers.",
    )
    vocab_size: int = Field(gt=0, le=10_000_000, description="Rows of the embedding; at least the tokenizer's.")
    hidden_size: int = Field(gt=0, le=1_000_000, description="Width of the residual stream.")
    norm: Literal["rmsnorm", "layernorm"] = Field(
        "rmsnorm",
        description="Norms of blocks, of MTP layers and before the head; `layernorm` has a mean and a bias. Norms inside of mixers stay RMSNorm.",
    )
    norm_epsilon: float = Field(1e-5, gt=0, description="Epsilon of every norm.")
    norm_placement: Literal["before", "after", "both", "after_attention"] = Field(
        "before",
        description="The norm of a block: `before` it, or `after` it, on the output that it adds to the residual stream (OLMo 2); `both`: two norms (Gemma 3); `after_attention`: after attention and the feed-forward after it, before other blocks (OLMo Hybrid).",
    )
    tie_embeddings: bool = Field(False, description="Head shares the embedding's weights.")
    head: str | None = Field(
        None,
        description="A head of an installed package, by name, with its options in model.mixers; null: a matrix and a softmax.",
    )
    initializer_range: float = Field(0.02, gt=0, description="Standard deviation of initial weights.")
    depth_scaled_init: bool = Field(
        True, description="Divide the deviation of output projections by sqrt(number of blocks)."
    )
    megatron_init: bool = Field(
        False,
        description="Initial values as Megatron-LM has them if ours differ: experts.down of latent experts is an output projection too, and biases of convolutions are uniform within 1 / sqrt(width).",
    )
    mamba: Mamba2Config | None = Field(None, description="Needed by M.")
    attention: AttentionConfig | None = Field(None, description="Needed by * (A).")
    moe: MoeConfig | None = Field(None, description="Needed by E (F).")
    feed_forward: FeedForwardConfig | None = Field(None, description="Needed by - (D).")
    mixers: RegisteredMixers = Field(RegisteredMixers(), description="Other sequence mixers; docs/mixers.md.")
    variants: Variants = Field(
        Variants(),
        description="Second options of kinds of block by name, `mamba_narrow: {of: mamba, ...}`; in the pattern as `{mamba_narrow}` (docs/mixers.md#variants).",
    )
    self_guided_training: GuideConfig | None = Field(
        None, description="Guide factored matrices while they train; null: no guide."
    )
    lora_mixer: LoraMixerConfig | None = Field(
        None,
        description="Low-rank updates of attention's projections that a router chooses among; null: no such updates.",
    )
    multipliers: MultipliersConfig = Field(MultipliersConfig(), description="Constant factors in the forward pass.")
    attention_residuals: AttentionResidualsConfig | None = Field(
        None, description="Blocks choose among earlier outputs what they read; null: they read the sum of all."
    )
    hyper_connections: HyperConnectionsConfig | None = Field(
        None, description="Several residual streams that blocks mix, read and write; null: one, the sum of all outputs."
    )
    mup: MupConfig | None = Field(None, description="Carry the learning rate over widths; null: one rate for all.")
    mtp: MtpConfig | None = Field(
        None,
        description="Multi-token prediction; of MTP layers after `/` in the pattern only, which have its defaults.",
    )
    residual_in_fp32: bool = Field(False, description="Keep the residual stream in float32 when weights are bf16.")
    logits_z_loss_weight: float = Field(
        0.0, ge=0, description="Squared log-sum-exp of the vocabulary logits (PaLM, arXiv 2204.02311, section 5)."
    )

    def packages_used(self) -> dict[str, str]:
        """Name and version of the package behind each mixer and router that is used, by its dotted key."""
        found = {f"model.mixers.{name}": package for name, package in self.mixers.packages_used().items()}
        packages = RegisteredMixers.packages
        found |= {
            f"model.variants.{name}": packages[own.of] for name, own in self.variants.items() if own.of in packages
        }
        for kind, options in self.sections():
            router: str | None = getattr(options, "router", None)
            if router is not None and router in RegisteredRouters.packages:
                found[f"model.{kind.section}.router"] = RegisteredRouters.packages[router]
        return found

    def options_of(self, kind: Kind) -> MixerOptions | None:
        """The options of a kind of block; None if its section is missing."""
        return kind.read(self)

    def with_options(self, kind: Kind, options: MixerOptions) -> ModelConfig:
        """The same model with other options for a kind of block."""
        if kind.is_core:
            return self.model_copy(update={kind.section: options})
        if kind.base != kind.name:
            return self.model_copy(update={"variants": Variants(**dict(self.variants.items()) | {kind.name: options})})
        return self.model_copy(update={"mixers": self.mixers.model_copy(update={kind.name: options})})

    def block_options(self, symbol: str) -> MixerOptions:
        """The options of the blocks of a symbol, which must have passed `check_model`."""
        kind = kind_of(symbol)
        options = self.options_of(kind)
        assert options is not None, f"check_model was not called: model.{kind.section} is missing"
        return options

    def sections(self) -> Iterator[tuple[Kind, MixerOptions]]:
        """Iterate over all kinds whose section is there, whether the pattern has them or not, with their options."""
        for kind in (*all_kinds().values(), *(find_kind(name) for name, _ in self.variants.items())):
            options = self.options_of(kind)
            if options is not None:
                yield kind, options

    def expert_sections(self) -> tuple[tuple[str, MoeConfig], ...]:
        """The sections of routed experts, of `model.moe` and of its variants, by key."""
        return tuple((f"model.{kind.section}", moe) for kind, moe in self.sections() if isinstance(moe, MoeConfig))

    def kinds_in_use(self) -> Iterator[tuple[Kind, MixerOptions]]:
        """Iterate over the kinds of the blocks that are built, and those that they wrap, whose section is there.

        Raises ValueError if the text is not a pattern, or names a kind that nothing registers.
        """
        symbols = dict.fromkeys(self.built_letters)
        found = {part.name: None for symbol in symbols for part in kind_of(symbol).parts}
        if self.head is not None:
            found[find_kind(self.head).name] = None
        for name in list(found):
            options = self.options_of(find_kind(name))
            if options is not None and options.wraps() in all_kinds():
                found.setdefault(str(options.wraps()))
        used = found.keys()
        yield from ((kind, options) for kind, options in self.sections() if kind.name in used)

    def auxiliary_names(self) -> tuple[str, ...]:
        """The auxiliary losses that all blocks add in training, each once."""
        names = [name for symbol in self.built_letters for name in self.block_options(symbol).auxiliary_names()]
        if self.head is not None:
            names += self.block_options(f"{{{self.head}}}").auxiliary_names()
        routed = () if self.lora_mixer is None else self.lora_mixer.auxiliary_names()
        return tuple(dict.fromkeys([*names, *routed]))

    def routed_experts(self) -> dict[int, int]:
        """Number of routed experts of each block that has a router, by the block's index among those built."""
        numbers = {
            index: self.block_options(symbol).routed_experts() for index, symbol in enumerate(self.built_letters)
        }
        return {index: number for index, number in numbers.items() if number}

    def has_factors(self) -> bool:
        """Whether a block of the pattern has factored matrices."""
        return any(part.structure != DENSE for _, options in self.kinds_in_use() for part in options.feed_forwards())

    @property
    def parsed_pattern(self) -> Pattern:
        """The blocks of `pattern`, in order. Raises ValueError if the text is not a pattern."""
        return parse_pattern(self.pattern)

    @property
    def letters(self) -> tuple[str, ...]:
        """The symbol of each main block, in order; raises as `parsed_pattern` does."""
        return self.parsed_pattern.letters

    @property
    def prediction(self) -> MtpConfig:
        """The settings of multi-token prediction, read where the pattern has depths."""
        return self.mtp or MtpConfig()

    def without_depths(self) -> ModelConfig:
        """The same model without multi-token prediction."""
        main = self.pattern.partition("/")[0]
        return self.model_copy(update={"pattern": main, "mtp": None}) if self.num_depths else self

    @property
    def num_depths(self) -> int:
        """MTP layers, 0 for none."""
        return self.parsed_pattern.num_depths

    @property
    def num_depth_modules(self) -> int:
        """Modules of multi-token prediction that the model has: one for all depths where they are shared."""
        return min(1, self.num_depths) if self.prediction.shared else self.num_depths

    @property
    def stream_name(self) -> str | None:
        """The field of the kind of residual stream; None: the sum of all outputs. `check_model` rejects two."""
        return next((name for name in STREAMS if getattr(self, name) is not None), None)

    @property
    def stream(self) -> StreamConfig | None:
        """The section of the kind of residual stream; None: the sum of all outputs."""
        found: StreamConfig | None = None if self.stream_name is None else getattr(self, self.stream_name)
        return found

    def plain_stream(self) -> ModelConfig:
        """The same model whose residual stream is the sum of all outputs."""
        return self if self.stream is None else self.model_copy(update=dict.fromkeys(STREAMS))

    def stream_tensors(self, num_blocks: int) -> int:
        """Tensors [B, T, D] that the residual stream is after so many blocks."""
        return 1 if self.stream is None else self.stream.num_tensors(num_blocks)

    def norms_after(self) -> tuple[bool, ...]:
        """Whether the norm of each block that is built comes after it; raises as `block_options`, where kinds matter."""
        symbols, is_after = self.built_letters, self.norm_placement == "after"
        if self.norm_placement != "after_attention":
            return tuple(is_after for _ in symbols)
        found = []
        for symbol in symbols:
            if kind_of(symbol).mixes != "channels":
                # Softmaxes of queries and keys have an answer.
                is_after = self.block_options(symbol).qk_clip() is not None
            found.append(is_after)
        return tuple(found)

    def norms_per_block(self) -> int:
        """Norms of the residual stream that each block has."""
        return 2 if self.norm_placement == "both" else 1

    def norm_parts(self) -> tuple[str, ...]:
        """Parameters of a norm of the residual stream, each as wide as that."""
        return ("weight", "bias") if self.norm == "layernorm" else ("weight",)

    @property
    def built_letters(self) -> tuple[str, ...]:
        """The symbol of each block that is built: the main ones, then those of each module of multi-token prediction."""
        return self.letters + self.num_depth_modules * self.parsed_pattern.depth_letters


def read_saved_model(saved: Any, packages: Mapping[str, str]) -> Any:
    """Read a saved ModelConfig's settings, before they are validated: what was left out meant its default of then.

    Raises as `read_saved_sections`, for sections of packages.
    """
    if not isinstance(saved, Mapping):
        return saved
    saved = copy.deepcopy(dict(saved))
    use_current_names(saved, "model.")
    changes: dict[str, Any] = {}
    if "mixers" in saved:
        changes["mixers"] = read_saved_sections(saved["mixers"], RegisteredMixers, "model.mixers", packages)
    moe = saved.get("moe")
    if isinstance(moe, Mapping) and (moe.get("expert_bias") or moe.get("num_router_groups", 1) > 1):
        changes["moe"] = {"balance_counts": "routed", **moe}
    return {**saved, **changes}


def has_indexer(model: ModelConfig) -> bool:
    """Whether a block of the pattern chooses its keys."""
    return any(getattr(options, "indexer", None) is not None for _, options in model.kinds_in_use())


def in_indexer_stage(model: ModelConfig, stage: IndexerStage | None) -> ModelConfig:
    """The model with all its indexers in this stage; None: as they are."""
    for kind, options in model.sections() if stage is not None else ():
        indexer = getattr(options, "indexer", None)
        if indexer is not None and indexer.stage != stage:
            changed = options.model_copy(update={"indexer": indexer.model_copy(update={"stage": stage})})
            model = model.with_options(kind, changed)
    return model
