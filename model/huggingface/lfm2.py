"""The transformers class `lfm2`: gated short convolutions, attention, gated feed-forwards.

Read from transformers 5.24 (`configuration_lfm2.py`, `modeling_lfm2.py`). Every layer is a convolution or attention and a
feed-forward, each after a norm; attention norms its query and key heads and rotates whole heads, whose halves are paired as
ours. The class has no field for the size of a head: it is the residual stream's width over the heads.

The transformers class `lfm2_moe`: the layers of `lfm2`, whose later feed-forwards are mixtures of experts.

Read from transformers 5.24 (`configuration_lfm2_moe.py`, `modeling_lfm2_moe.py`). A sigmoid scores experts, a bias may steer the
choice, there is no shared expert. The class adds 1e-6 to the sum by which it divides chosen scores, which is below rounding
unless all of them are close to zero; names of tensors are those of the release, which transformers renames while loading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from amfm.model.config.core_options import AttentionConfig, FeedForwardConfig
from amfm.model.config.mixer_options import ShortConvOptions
from amfm.model.config.moe import MoeConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.entries import WeightEntry, WeightMap, paired_map
from amfm.model.huggingface.fields import (
    GATED,
    NORMED_ROTARY,
    WHOLE_HEADS,
    Wanted,
    flat_rope_fields,
    read_sizes,
    require_fields,
    rope_from_parameters,
    rope_parameters,
    unfit_expert_sizes,
    unfit_gates,
    unfit_multipliers,
    unfit_settings,
    unfit_softmax_scale,
)
from amfm.model.huggingface.hf_class import HfTarget
from amfm.model.huggingface.qwen3_next_weights import GatedEntry, gated_experts
from amfm.model.huggingface.refusals import IGNORED_ARGUMENTS, NO_CLASSIFIER, Refusal, misses_sentencepiece

LAYER_TYPES = {"C": "conv", "*": "full_attention"}
LETTERS = {name: letter for letter, name in LAYER_TYPES.items()}


def conv_options(config: ModelConfig) -> ShortConvOptions:
    """Options of the convolution blocks, which the pattern has."""
    options = config.block_options("C")
    assert isinstance(options, ShortConvOptions), f"C has {type(options).__name__}"
    return options


def unfit_for_lfm2(config: ModelConfig) -> list[str]:
    """List every choice that the class cannot hold, as value, rule and fix."""
    letters = config.letters
    mixers, seconds = letters[0::2], letters[1::2]
    reasons = unfit_layers(config, "lfm2")
    if not (len(mixers) == len(seconds) and set(mixers) <= set(LAYER_TYPES) and set(seconds) <= {"-"}):
        reasons.append(
            f"model.pattern={''.join(letters)}: layers of lfm2 are pairs, C or * and then -; use such a pattern, or target own"
        )
    return reasons


def unfit_layers(config: ModelConfig, target: str) -> list[str]:
    """List what layers of either class cannot hold, but for their order."""
    letters = config.letters
    reasons = unfit_multipliers(config, target) + unfit_gates(config, target)
    if "*" in letters and config.attention is not None:
        reasons += _unfit_attention(config.hidden_size, config.attention, target)
    if "-" in letters:
        reasons += unfit_settings("model.feed_forward", config.feed_forward, target, GATED)
    return reasons


def _unfit_attention(hidden_size: int, attention: AttentionConfig, target: str) -> Iterator[str]:
    yield from unfit_settings("model.attention", attention, target, NORMED_ROTARY)
    yield from unfit_settings("model.attention.rope", attention.rope, target, WHOLE_HEADS)
    if attention.head_dim * attention.num_heads != hidden_size:
        rule = f"the heads of {target} are hidden_size / num_heads = {hidden_size / attention.num_heads:g} wide"
        yield f"model.attention.head_dim={attention.head_dim}: {rule}; use that, or target own"
    yield from unfit_softmax_scale(attention, target)


def lfm2_fields(config: ModelConfig) -> dict[str, Any]:
    """Build the fields of config.json that are the class's own."""
    assert config.feed_forward is not None, "every layer of lfm2 has a feed-forward"
    return layer_fields(config) | {
        "architectures": ["Lfm2ForCausalLM"],
        "model_type": "lfm2",
        "intermediate_size": config.feed_forward.hidden_size,
        "block_auto_adjust_ff_dim": False,
        # What mlx-lm and vLLM ask for, after the released config.json: other names of the width, and numbers of the
        # adjustment.
        "block_dim": config.hidden_size,
        "conv_dim": config.hidden_size,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
    }


def layer_fields(config: ModelConfig) -> dict[str, Any]:
    """Build the fields of convolutions and attention, alike in both classes."""
    mixers = config.letters[0::2]
    fields: dict[str, Any] = {
        "num_hidden_layers": len(mixers),
        "layer_types": [LAYER_TYPES[letter] for letter in mixers],
        "norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "conv_bias": False,
        "conv_L_cache": conv_options(config).conv_kernel if "C" in mixers else 3,
        # A model without attention still needs sizes that the class accepts.
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    if "*" in mixers:
        assert config.attention is not None, "the pattern has *, the configuration no attention section"
        fields |= {
            "num_attention_heads": config.attention.num_heads,
            "num_key_value_heads": config.attention.num_kv_heads,
            "rope_parameters": rope_parameters(config.attention),
        }
    return fields | flat_rope_fields(fields["rope_parameters"])


def model_config_from_lfm2(fields: Mapping[str, Any]) -> ModelConfig:
    """Build our configuration from config.json with the class's defaults filled in.

    Raises ValueError if the class uses something that our model does not have.
    """
    layers = read_layers(fields, "-" * len(fields["layer_types"]))
    dense = FeedForwardConfig(hidden_size=_inner_width(fields), activation="swiglu")
    return ModelConfig.model_validate(layers | {"feed_forward": dense})


def read_layers(fields: Mapping[str, Any], seconds: str) -> dict[str, Any]:
    """Read the sections of convolutions and attention, alike in both classes; `seconds`: the second letter of each layer.

    Raises ValueError if the class uses something that our model does not have.
    """
    require_fields(fields, {"conv_bias": False})
    pattern = "".join(LETTERS[kind] + second for kind, second in zip(fields["layer_types"], seconds, strict=True))
    return {
        "pattern": pattern,
        **read_sizes(fields, "norm_eps"),
        "attention": _attention(fields) if "*" in pattern else None,
        "mixers": {"short_conv": {"conv_kernel": fields["conv_L_cache"]}} if "C" in pattern else {},
    }


def _attention(fields: Mapping[str, Any]) -> AttentionConfig:
    heads = fields["num_attention_heads"]
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=fields["num_key_value_heads"],
        head_dim=fields["hidden_size"] // heads,
        qk_norm=True,
        positions="rope",
        rope=rope_from_parameters(fields.get("rope_parameters") or {}),
    )


def _inner_width(fields: Mapping[str, Any]) -> int:
    """Width of the feed-forward: as it stands, or two thirds of it, scaled and rounded up to a multiple."""
    width: int = fields["intermediate_size"]
    if not fields["block_auto_adjust_ff_dim"]:
        return width
    scaled = int((fields["block_ffn_dim_multiplier"] or 1.0) * int(2 * width / 3))
    multiple: int = fields["block_multiple_of"]
    return -(-scaled // multiple) * multiple


def lfm2_map(config: ModelConfig) -> WeightMap:
    """Build the weight map of a model that fits either class: the other one has blocks E too."""
    return paired_map(config, _BLOCKS, norms=("operator_norm", "ffn_norm"), final="embedding_norm")


def _conv_entries(config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
    for name in ("in_proj.weight", "out_proj.weight"):
        yield WeightEntry(ours + name, (f"{layer}conv.{name}",))
    yield WeightEntry(f"{ours}conv.weight", (f"{layer}conv.conv.weight",), "conv")


def _attention_entries(config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
    theirs = {"o_proj": "out_proj", "q_norm": "q_layernorm", "k_norm": "k_layernorm"}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
        yield WeightEntry(f"{ours}{name}.weight", (f"{layer}self_attn.{theirs.get(name, name)}.weight",))


def _dense_entries(config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
    halves = (f"{layer}feed_forward.w1.weight", f"{layer}feed_forward.w3.weight")
    yield GatedEntry(f"{ours}up_proj.weight", halves)
    yield WeightEntry(f"{ours}down_proj.weight", (f"{layer}feed_forward.w2.weight",))


def _expert_entries(config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
    assert config.moe is not None, "the pattern has E, the configuration no moe section"
    theirs = f"{layer}feed_forward."
    yield WeightEntry(f"{ours}router.weight", (f"{theirs}gate.weight",))
    if config.moe.expert_bias:
        yield WeightEntry(f"{ours}expert_bias", (f"{theirs}expert_bias",))
    yield from gated_experts(ours, theirs, config.moe.num_experts, ("w1", "w3", "w2"))


_BLOCKS = {"C": _conv_entries, "*": _attention_entries, "-": _dense_entries, "E": _expert_entries}


def limits(config: ModelConfig) -> list[str]:
    """What the class does not do."""
    packed = "Documents packed into one sequence run into each other in its convolutions: leave packing off."
    return [*([packed] if "C" in config.letters else []), IGNORED_ARGUMENTS, NO_CLASSIFIER]


def refusals(config: ModelConfig, tokenizer_kind: str) -> list[Refusal]:
    """Name the programs that are known to reject a model of either class."""
    found = []
    if "*" in config.letters:
        rule = (
            "it hands heads as their own dimension to its rotary kernel (lfm2.py:176, lfm2_moe.py:257), which on a CPU takes "
            "them for tokens and silently produces different values; serve it from a GPU"
        )
        found.append(Refusal("vllm", rule, misreads=True))
    if not config.tie_embeddings:
        rule = 'it has no separate head and ends with "parameters not in model"; set model.tie_embeddings: true'
        found.append(Refusal("mlx-lm", rule))
    return found


def lfm2_refusals(config: ModelConfig, tokenizer_kind: str) -> list[Refusal]:
    """Name the programs that are known to reject a model of the class."""
    return misses_sentencepiece("lfm2", tokenizer_kind) + refusals(config, tokenizer_kind)


CLASS = HfTarget(
    name="lfm2",
    model_type="lfm2",
    class_name="Lfm2ForCausalLM",
    unfit=unfit_for_lfm2,
    fields=lfm2_fields,
    read=model_config_from_lfm2,
    weights=lfm2_map,
    refusals=lfm2_refusals,
    limits=limits,
)


# What a mixture of the class must be, with the reason.
EXPERTS: Wanted = {
    "activation": ("swiglu", "experts are gated"),
    "router": ("sigmoid", "a sigmoid scores experts"),
    "num_router_groups": (1, "experts are not grouped"),
    "shared_expert_hidden_size": (0, "there is no shared expert"),
    "latent_size": (None, "experts read the full width"),
}


def unfit_for_lfm2_moe(config: ModelConfig) -> list[str]:
    """List every choice that the class cannot hold, as value, rule and fix."""
    letters = config.letters
    reasons = unfit_layers(config, "lfm2_moe")
    mixers, seconds = letters[0::2], letters[1::2]
    is_paired = len(mixers) == len(seconds) and set(mixers) <= set(LAYER_TYPES) and set(seconds) <= set("-E")
    if not is_paired or "E" not in seconds or "-" in seconds[seconds.index("E") :]:
        reasons.append(
            f"model.pattern={''.join(letters)}: layers of lfm2_moe are pairs, C or * and then - or E, with all - before the "
            "first E; use such a pattern, target lfm2 without E, or own"
        )
    if "E" in letters and config.moe is not None:
        reasons += unfit_settings("model.moe", config.moe, "lfm2_moe", EXPERTS) + unfit_expert_sizes(config, config.moe)
    return reasons


def lfm2_moe_fields(config: ModelConfig) -> dict[str, Any]:
    """Build the fields of config.json that are the class's own."""
    moe, dense = config.moe, config.feed_forward
    assert moe is not None, "the pattern has E, the configuration no moe section"
    return layer_fields(config) | {
        "architectures": ["Lfm2MoeForCausalLM"],
        "model_type": "lfm2_moe",
        "num_dense_layers": config.letters.count("-"),
        "intermediate_size": dense.hidden_size if dense is not None else moe.expert_hidden_size,
        "moe_intermediate_size": moe.expert_hidden_size,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "use_expert_bias": moe.expert_bias,
        "norm_topk_prob": moe.normalize_probabilities,
        "routed_scaling_factor": moe.routed_scaling,
    }


def model_config_from_lfm2_moe(fields: Mapping[str, Any]) -> ModelConfig:
    """Build our configuration from config.json with the class's defaults filled in.

    Raises ValueError if the class uses something that our model does not have.
    """
    layers = len(fields["layer_types"])
    dense = min(fields["num_dense_layers"], layers)
    sections = read_layers(fields, "-" * dense + "E" * (layers - dense))
    if dense:
        sections["feed_forward"] = FeedForwardConfig(hidden_size=fields["intermediate_size"], activation="swiglu")
    if dense < layers:
        sections["moe"] = MoeConfig(
            num_experts=fields["num_experts"],
            top_k=fields["num_experts_per_tok"],
            expert_hidden_size=fields["moe_intermediate_size"],
            shared_expert_hidden_size=0,
            activation="swiglu",
            router="sigmoid",
            expert_bias=fields["use_expert_bias"],
            normalize_probabilities=fields["norm_topk_prob"],
            routed_scaling=fields["routed_scaling_factor"],
        )
    return ModelConfig.model_validate(sections)


MOE_CLASS = HfTarget(
    name="lfm2_moe",
    model_type="lfm2_moe",
    class_name="Lfm2MoeForCausalLM",
    unfit=unfit_for_lfm2_moe,
    fields=lfm2_moe_fields,
    read=model_config_from_lfm2_moe,
    weights=lfm2_map,
    refusals=refusals,
    limits=limits,
)
