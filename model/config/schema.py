"""Sections of a model's configuration: one frozen section for each kind of block."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, create_model

from amfm.model.config.lora_mixer import LoraMixerConfig
from amfm.model.config.mixer_options import OutputGate
from amfm.model.config.mixer_registry import ENTRY_POINTS, MixerSpec, mixer_specs
from amfm.model.config.pattern import Pattern, parse_pattern
from amfm.model.config.plugins import PluginSections, list_packages, read_saved_sections
from amfm.model.config.rope import Llama3Stretch
from amfm.model.config.section import Section
from amfm.model.config.structure import DENSE, LinearKind, Structure

Activation = Literal["swiglu", "squared_relu"]


class Mamba2Config(Section):
    """Mamba2 mixer (Dao and Gu 2024, arXiv 2405.21060); letter `M`."""

    num_heads: int = Field(gt=0, description="Heads of the recurrence; free of hidden_size.")
    head_dim: int = Field(64, gt=0, description="Channels a head; inner width = num_heads * head_dim.")
    state_size: int = Field(128, gt=0, description="State numbers a channel (N).")
    num_groups: int = Field(
        8,
        gt=0,
        description="Groups that share B and C; must divide num_heads. vLLM needs a multiple of its tensor ranks.",
    )
    conv_kernel: int = Field(4, ge=2, le=4, description="Width of the causal depthwise convolution over x, B and C.")
    conv_bias: bool = Field(True, description="Bias in the convolution.")
    chunk_size: int = Field(
        64, gt=0, description="Tokens a chunk of the scan; changes speed and rounding, not meaning."
    )
    keep_states: bool = Field(
        False,
        description="Keep the scan's results (as wide as x) and the states that enter chunks (state_size / chunk_size times x) "
        "for backward, 2 to 3 times the width of x; else it makes them again: a tenth more traffic of the scan, a launch more. "
        "Better true where train.recompute makes the block again anyway. Triton only: torch always keeps them.",
    )
    a_init_min: float = Field(
        1.0, gt=0, description="-A starts uniform in [a_init_min, a_init_max], one number a head."
    )
    a_init_max: float = Field(16.0, gt=0, description="Upper end of the range for -A.")
    time_step_min: float = Field(1e-3, gt=0, description="dt starts log-uniform in [time_step_min, time_step_max].")
    time_step_max: float = Field(1e-1, gt=0, description="Upper end of the range for the first dt.")
    time_step_floor: float = Field(1e-4, gt=0, description="Smallest first dt; dt is never clamped at run time.")

    def inner_size(self) -> int:
        """Width of x and z: num_heads * head_dim."""
        return self.num_heads * self.head_dim

    def conv_channels(self) -> int:
        """Channels that pass the convolution: x, B and C."""
        return self.inner_size() + 2 * self.num_groups * self.state_size


class RopeConfig(Section):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864) and how they are stretched to longer texts."""

    theta: float = Field(10_000.0, gt=0, description="Base of the frequencies.")
    fraction: float = Field(1.0, gt=0, le=1, description="Part of each head that is rotated.")
    scaling: Literal["none", "ntk", "yarn", "llama3"] = Field(
        "none",
        description="`ntk`: theta * alpha^(d/(d-2)); `yarn`: Peng et al. 2023 (arXiv 2309.00071); `llama3`: as Llama 3.1 and later.",
    )
    ntk_alpha: float | None = Field(
        None, ge=1, description="NTK-aware alpha (Hunyuan: 50 for 32K, 1000 for 256K); only with scaling: ntk."
    )
    yarn_factor: float | None = Field(
        None, ge=1, description="Length to come / length trained; only with scaling: yarn."
    )
    yarn_original_length: int | None = Field(
        None, gt=0, description="Length trained before stretching; only with scaling: yarn."
    )
    yarn_beta_fast: float = Field(32.0, gt=0, description="Rotations above which a frequency is left alone.")
    yarn_beta_slow: float = Field(1.0, gt=0, description="Rotations below which a frequency is interpolated.")
    llama3: Llama3Stretch | None = Field(None, description="Only with scaling: llama3.")


class AttentionConfig(Section):
    """Causal grouped-query attention; letter `*` (Hunyuan: `A`)."""

    num_heads: int = Field(gt=0, description="Query heads.")
    num_kv_heads: int = Field(gt=0, description="Key and value heads; must divide num_heads.")
    head_dim: int = Field(gt=0, description="Channels a head; free of hidden_size.")
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
        description="Sigmoid of the input times each head's output before o_proj: a gate a channel (`element`, as Qwen3-Next) or a head.",
    )


class FeedForwardConfig(Section):
    """Dense feed-forward; letter `-` (Hunyuan: `D`)."""

    hidden_size: int = Field(gt=0, description="Inner width.")
    activation: Activation = Field(
        "squared_relu", description="`swiglu` is gated and has a third matrix; `squared_relu` is not gated."
    )
    linear_kind: LinearKind = Field(
        "dense",
        description="Form of the matrices: products of two factors, `lowrank` (linear_rank), `blockshuffle` (linear_blocks) or `blockdense` (both); docs/structure.md.",
    )
    linear_rank: int | None = Field(None, gt=0, description="Numbers a token between the factors; lowrank, blockdense.")
    linear_blocks: int | None = Field(
        None,
        ge=2,
        description="Blocks of a block-diagonal factor; blockshuffle, blockdense. Tensor ranks must divide it.",
    )

    def structure(self) -> Structure:
        """Form of the matrices."""
        return Structure(self.linear_kind, self.linear_rank, self.linear_blocks)


class GuideConfig(Section):
    """Self-guided training of factored matrices (Wei et al. 2024, arXiv 2406.16450): a dense matrix beside each, which fades.

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


class MoeConfig(Section):
    """Mixture of experts with optional shared expert; letter `E` (Hunyuan: `F`)."""

    num_experts: int = Field(gt=0, description="Routed experts.")
    top_k: int = Field(gt=0, description="Routed experts a token; at most num_experts.")
    expert_hidden_size: int = Field(gt=0, description="Inner width of a routed expert.")
    shared_expert_hidden_size: int = Field(0, ge=0, description="Inner width of the shared expert; 0: none.")
    shared_expert_gate: bool = Field(
        False, description="Sigmoid of the input, a number a token, times the shared expert's output, as Qwen3-Next."
    )
    shared_expert_linear_kind: LinearKind = Field(
        "dense",
        description="Form of the shared expert's matrices, as feed_forward.linear_kind; routed experts are dense.",
    )
    shared_expert_linear_rank: int | None = Field(None, gt=0, description="As feed_forward.linear_rank.")
    shared_expert_linear_blocks: int | None = Field(None, ge=2, description="As feed_forward.linear_blocks.")
    activation: Activation = Field("squared_relu", description="Of routed and shared experts.")
    router: Literal["softmax", "sigmoid"] = Field("sigmoid", description="How logits become scores.")
    normalize_probabilities: bool = Field(True, description="Divide the chosen scores by their sum.")
    routed_scaling: float = Field(1.0, gt=0, description="Factor on the chosen probabilities.")
    num_router_groups: int = Field(1, gt=0, description="Groups of experts for group-limited routing; 1: no limit.")
    router_group_top_k: int = Field(1, gt=0, description="Groups a token may use; at most num_router_groups.")
    expert_bias: bool = Field(
        False,
        description="Add a balancing bias to the scores when choosing (Wang et al. 2024, arXiv 2408.15664); sigmoid only.",
    )
    bias_update_rate: float = Field(1e-3, ge=0, description="Change of the balancing bias after each step.")
    auxiliary_loss_weight: float = Field(
        0.0, ge=0, description="Balance over a micro-batch (Fedus et al. 2021, arXiv 2101.03961, section 2.2)."
    )
    sequence_loss_weight: float = Field(
        0.0, ge=0, description="Balance inside each row (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."
    )
    z_loss_weight: float = Field(
        0.0, ge=0, description="Squared log-sum-exp of the router logits (Zoph et al. 2022, arXiv 2202.08906)."
    )
    latent_size: int | None = Field(
        None, gt=0, description="Width at which tokens travel to routed experts; none: hidden_size."
    )
    capacity_factor: float | None = Field(
        None,
        gt=0,
        description="While training, an expert takes this many times its even share of a micro-batch's choices; none: all that come.",
    )
    overflow: Literal["drop", "recycle"] = Field(
        "drop",
        description="Choices over capacity are lost, or go to a random expert with room (Hunyuan-Large, arXiv 2411.02265).",
    )

    def shared_structure(self) -> Structure:
        """Form of the shared expert's matrices."""
        return Structure(
            self.shared_expert_linear_kind, self.shared_expert_linear_rank, self.shared_expert_linear_blocks
        )


class MultipliersConfig(Section):
    """Constant factors in the forward pass, as Granite 4 and Falcon-H1 train with; that on scores is attention.softmax_scale."""

    embedding: float = Field(1.0, gt=0, description="On what the embedding gives; not on a tied head.")
    residual: float = Field(1.0, gt=0, description="On what each block adds to the residual stream.")
    logits: float = Field(
        1.0, gt=0, description="On the logits (Granite: 1 / logits_scaling; Falcon-H1: lm_head_multiplier)."
    )


class MupConfig(Section):
    """Maximal update parametrization: rates found at a narrow width hold at a wide one; docs/mup.md."""

    base_hidden_size: int = Field(
        gt=0, description="Width at which initializer_range and optimizer.learning_rate were found; hidden_size there."
    )


class MtpConfig(Section):
    """Multi-token prediction: what the depths behind `/` in the pattern learn (DeepSeek-V3, arXiv 2412.19437, section 2.2)."""

    loss_weight: float = Field(0.3, gt=0, description="Of the mean of all depths' losses; the main loss has 1.")
    shared: bool = Field(
        False, description="One module for all depths, as Nemotron 3 Super and Ultra; else one for each."
    )
    detach: bool = Field(
        False, description="Depths give the main model no gradient: they are trained on a model as it is."
    )


class MixersConfig(PluginSections):
    """Options of registered mixers, by name; needed by their letter or `{name}` in the pattern."""

    group: ClassVar[str] = ENTRY_POINTS
    packages: ClassVar[Mapping[str, str]] = list_packages(ENTRY_POINTS, MixerSpec)


# A field a registered mixer, so that files, overrides, the schema and its pages treat plugins like our own.
_MIXER_FIELDS: dict[str, Any] = {
    spec.name: (spec.options | None, Field(None, description=f"Needed by {spec.symbol}."))
    for spec in mixer_specs().values()
}
RegisteredMixers: type[MixersConfig] = create_model(
    "RegisteredMixers", __base__=MixersConfig, __module__=__name__, **_MIXER_FIELDS
)
RegisteredMixers.__doc__ = MixersConfig.__doc__


class ModelConfig(Section):
    """A hybrid decoder: embedding, blocks of the pattern, norm, head."""

    pattern: str = Field(
        min_length=1,
        description="Blocks in order: M Mamba2, * attention, E MoE, - dense; or Hunyuan's A, M, F, D; other mixers by letter or `{name}` (docs/mixers.md). `(MF)*8 AF` or `((ME)x8 *E)x7 ME` repeats, `|` cuts pipeline stages; `ME/*E/*E` has two depths of multi-token prediction.",
    )
    vocab_size: int = Field(gt=0, description="Rows of the embedding; at least the tokenizer's.")
    hidden_size: int = Field(gt=0, description="Width of the residual stream.")
    norm_epsilon: float = Field(1e-5, gt=0, description="Of every RMSNorm.")
    tie_embeddings: bool = Field(False, description="Head shares the embedding's weights.")
    initializer_range: float = Field(0.02, gt=0, description="Standard deviation of first weights.")
    depth_scaled_init: bool = Field(
        True, description="Divide the deviation of output projections by sqrt(number of blocks)."
    )
    mamba: Mamba2Config | None = Field(None, description="Needed by M.")
    attention: AttentionConfig | None = Field(None, description="Needed by * (A).")
    moe: MoeConfig | None = Field(None, description="Needed by E (F).")
    feed_forward: FeedForwardConfig | None = Field(None, description="Needed by - (D).")
    mixers: RegisteredMixers = Field(RegisteredMixers(), description="Other sequence mixers; docs/mixers.md.")
    guide: GuideConfig | None = Field(None, description="Guide factored matrices while they train; none: no guide.")
    lora_mixer: LoraMixerConfig | None = Field(
        None,
        description="Low-rank updates of attention's projections that a router chooses among; none: no such updates.",
    )
    multipliers: MultipliersConfig = Field(MultipliersConfig(), description="Constant factors in the forward pass.")
    mup: MupConfig | None = Field(None, description="Carry the learning rate over widths; none: one rate for all.")
    mtp: MtpConfig | None = Field(
        None, description="Multi-token prediction; of depths behind `/` in the pattern alone, which have its defaults."
    )
    residual_in_fp32: bool = Field(False, description="Keep the residual stream in float32 when weights are bf16.")
    logits_z_loss_weight: float = Field(
        0.0, ge=0, description="Squared log-sum-exp of the vocabulary logits (PaLM, arXiv 2204.02311, section 5)."
    )

    def has_factors(self) -> bool:
        """Whether a block of the pattern has factored matrices."""
        dense, moe, letters = self.feed_forward, self.moe, self.built_letters
        in_dense = "-" in letters and dense is not None and dense.structure() != DENSE
        return in_dense or ("E" in letters and moe is not None and moe.shared_structure() != DENSE)

    @property
    def parsed_pattern(self) -> Pattern:
        """The blocks of `pattern`, in order. Raises ValueError where the text is not a pattern."""
        return parse_pattern(self.pattern)

    @property
    def letters(self) -> tuple[str, ...]:
        """The symbol of each main block, in order; raises as `parsed_pattern` does."""
        return self.parsed_pattern.letters

    @property
    def prediction(self) -> MtpConfig:
        """The settings of multi-token prediction, read where the pattern has depths."""
        return self.mtp or MtpConfig()

    def without_depths(self) -> "ModelConfig":
        """The same model without multi-token prediction."""
        main = self.pattern.partition("/")[0]
        return self.model_copy(update={"pattern": main, "mtp": None}) if self.num_depths else self

    @property
    def num_depths(self) -> int:
        """Depths of multi-token prediction, 0 for none."""
        return self.parsed_pattern.num_depths

    @property
    def num_depth_modules(self) -> int:
        """Modules of multi-token prediction that the model has: one for all depths where they are shared."""
        return min(1, self.num_depths) if self.prediction.shared else self.num_depths

    @property
    def built_letters(self) -> tuple[str, ...]:
        """The symbol of each block that is built: the main ones, then those of each module of multi-token prediction."""
        return self.letters + self.num_depth_modules * self.parsed_pattern.depth_letters


def read_saved_model(saved: Any, packages: Mapping[str, str]) -> Any:
    """Settle the sections of packages in a saved ModelConfig, before it is validated; raises as `read_saved_sections`."""
    if not isinstance(saved, Mapping) or "mixers" not in saved:
        return saved
    return {**saved, "mixers": read_saved_sections(saved["mixers"], RegisteredMixers, "model.mixers", packages)}
