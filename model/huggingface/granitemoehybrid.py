"""The transformers class `granitemoehybrid` (pairs of Mamba2 or attention and a feed-forward): which models fit it, and how.

Read from transformers 5.24 (`configuration_granitemoehybrid.py`, `modeling_granitemoehybrid.py`). Its multipliers are ours: `attention_multiplier` is the
scale of the softmax, and `logits_scaling` divides where ours multiplies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from amfm.model.config.core_options import AttentionConfig, FeedForwardConfig
from amfm.model.config.moe import MoeConfig
from amfm.model.config.rope import RopeConfig
from amfm.model.config.schema import ModelConfig, MultipliersConfig
from amfm.model.huggingface.entries import CONV_FORMS, BlockEntries, WeightEntry, WeightMap, Zeros, paired_map
from amfm.model.huggingface.fields import (
    GATED,
    LAYER_NAMES,
    NO_QK_NORM,
    WHOLE_HEADS,
    Wanted,
    flat_rope_fields,
    letters_of,
    mamba_fields,
    read_mamba,
    read_sizes,
    require_fields,
    rope_from_parameters,
    rope_parameters,
    unfit_expert_sizes,
    unfit_gates,
    unfit_mixers,
    unfit_settings,
)
from amfm.model.huggingface.hf_class import HfTarget
from amfm.model.huggingface.refusals import (
    IGNORED_ARGUMENTS,
    NO_CLASSIFIER,
    Refusal,
    misses_sentencepiece,
    norms_groups_together,
    packed_rows,
)
from amfm.model.shapes import block_shapes

# Classes that hold what this one does not.
EITHER = "nemotron_h or own"
EXPERTS: Wanted = {
    "activation": ("swiglu", "experts are gated"),
    "router": ("softmax", "a softmax scores experts"),
    "normalize_probabilities": (True, "the softmax is over the chosen experts, which is the normalized one"),
    "routed_scaling": (1.0, "there is no such factor"),
    "num_router_groups": (1, "experts are not grouped"),
    "expert_bias": (False, "the router has no bias"),
    "latent_size": (None, "experts read the full width"),
}


def unfit_for_granite(config: ModelConfig) -> list[str]:
    """List every choice that the class cannot hold, as value, rule and fix."""
    letters = config.letters
    reasons = unfit_mixers(config, "granitemoehybrid") or _unfit_pairs(letters)
    reasons += unfit_gates(config, "granitemoehybrid")
    if "E" in letters and config.moe is not None:
        reasons += unfit_settings("model.moe", config.moe, "granitemoehybrid", EXPERTS, EITHER)
        reasons += unfit_expert_sizes(config, config.moe)
    if "-" in letters:
        reasons += unfit_settings("model.feed_forward", config.feed_forward, "granitemoehybrid", GATED, EITHER)
    if "*" in letters:
        reasons += _unfit_granite_attention(config)
    if "M" in letters and config.mamba is not None and config.mamba.inner_size() % config.hidden_size:
        reasons.append(
            f"model.mamba.num_heads={config.mamba.num_heads} x head_dim={config.mamba.head_dim} = "
            f"{config.mamba.inner_size()}: granitemoehybrid needs a whole multiple of model.hidden_size="
            f"{config.hidden_size}; change either, or target nemotron_h or own"
        )
    return reasons


def _unfit_pairs(letters: tuple[str, ...]) -> list[str]:
    """granitemoehybrid: every layer is a mixer and then a feed-forward, the same kind of feed-forward in all of them."""
    mixers, seconds = letters[0::2], letters[1::2]
    paired = len(mixers) == len(seconds) and all(letter in "M*" for letter in mixers)
    if paired and (all(letter == "E" for letter in seconds) or all(letter == "-" for letter in seconds)):
        return []
    return [
        f"model.pattern={''.join(letters)}: layers of granitemoehybrid are pairs, M or * and then E (or - in every pair); "
        "use such a pattern, or target nemotron_h or own"
    ]


def _unfit_granite_attention(config: ModelConfig) -> list[str]:
    attention = config.attention
    if attention is None:
        return []
    reasons: list[str] = []
    if attention.head_dim * attention.num_heads != config.hidden_size:
        reasons.append(
            f"model.attention.num_heads={attention.num_heads} x head_dim={attention.head_dim} = "
            f"{attention.num_heads * attention.head_dim}: granitemoehybrid has no field for the head size and takes "
            f"model.hidden_size={config.hidden_size} over num_heads; make the product equal, or target nemotron_h or own"
        )
    reasons += unfit_settings("model.attention", attention, "granitemoehybrid", NO_QK_NORM)
    if attention.positions == "rope":
        reasons += unfit_settings("model.attention.rope", attention.rope, "granitemoehybrid", WHOLE_HEADS)
    return reasons


def granite_fields(config: ModelConfig) -> dict[str, Any]:
    """Build the fields of config.json that are the class's own."""
    letters = config.letters
    mixers = letters[0::2]
    fields: dict[str, Any] = {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "num_hidden_layers": len(mixers),
        "layer_types": [LAYER_NAMES[letter] for letter in mixers],
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "embedding_multiplier": config.multipliers.embedding,
        "residual_multiplier": config.multipliers.residual,
        "logits_scaling": _divisor(config.multipliers.logits),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mamba_proj_bias": False,
        # None of ours: dt is below 1e30, and JSON cannot spell infinity. mlx-lm would keep dt at 0.001 or more.
        "time_step_limit": [0.0, 1e30],
        # As the released models say it: to mlx-lm every other value is "rope", and the base has to be there.
        "position_embedding_type": "nope",
        "rope_theta": 10_000.0,
        # A model without Mamba2 or attention still needs sizes that the class accepts.
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "attention_multiplier": 1.0,
        "mamba_n_heads": 1,
        "mamba_d_head": config.hidden_size,
        "mamba_expand": 1,
    }
    if config.moe is not None:
        fields |= {
            "num_local_experts": config.moe.num_experts,
            "num_experts_per_tok": config.moe.top_k,
            "intermediate_size": config.moe.expert_hidden_size,
            "shared_intermediate_size": config.moe.shared_expert_hidden_size or 1,
        }
    elif config.feed_forward is not None:
        fields |= {
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "intermediate_size": config.feed_forward.hidden_size,
            "shared_intermediate_size": config.feed_forward.hidden_size,
        }
    if config.attention is not None:
        fields |= _granite_attention_fields(config.attention)
    if config.mamba is not None:
        mamba = config.mamba
        fields |= mamba_fields(mamba) | {"mamba_expand": mamba.inner_size() // config.hidden_size}
    return fields


def _divisor(multiplier: float) -> float:
    """1 / multiplier to 12 digits, so that a whole divisor comes back whole."""
    return float(f"{1.0 / multiplier:.12g}")


def _granite_attention_fields(attention: AttentionConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        # The class multiplies by this and defaults to 1.
        "attention_multiplier": attention.softmax_scale or attention.head_dim**-0.5,
    }
    if attention.positions == "none":
        return fields
    rope = rope_parameters(attention)
    return fields | {"position_embedding_type": "rope", "rope_parameters": rope} | flat_rope_fields(rope)


def model_config_from_granite(fields: Mapping[str, Any]) -> ModelConfig:
    """Our configuration from config.json with the class's defaults filled in; ValueError for what our model has not."""
    require_fields(
        fields,
        {
            "hidden_act": "silu",
            "attention_bias": False,
            "mamba_proj_bias": False,
        },
    )
    mixers = letters_of(list(fields["layer_types"]))
    second = "E" if fields["num_local_experts"] else "-"
    return ModelConfig(
        pattern="".join(mixer + second for mixer in mixers),
        **read_sizes(fields),
        multipliers=MultipliersConfig(
            embedding=fields.get("embedding_multiplier", 1.0),
            residual=fields.get("residual_multiplier", 1.0),
            logits=1.0 / fields.get("logits_scaling", 1.0),
        ),
        mamba=read_mamba(fields) if "M" in mixers else None,
        attention=_granite_attention(fields) if "*" in mixers else None,
        feed_forward=FeedForwardConfig(hidden_size=fields["shared_intermediate_size"], activation="swiglu")
        if second == "-"
        else None,
        moe=MoeConfig(
            num_experts=fields["num_local_experts"],
            top_k=fields["num_experts_per_tok"],
            expert_hidden_size=fields["intermediate_size"],
            shared_expert_hidden_size=fields["shared_intermediate_size"],
            activation="swiglu",
            router="softmax",
            normalize_probabilities=True,
        )
        if second == "E"
        else None,
    )


def _granite_attention(fields: Mapping[str, Any]) -> AttentionConfig:
    heads = fields["num_attention_heads"]
    head_dim = fields.get("head_dim") or fields["hidden_size"] // heads
    scale = float(fields["attention_multiplier"])
    rope = RopeConfig()
    if fields["position_embedding_type"] == "rope":
        rope = rope_from_parameters(fields.get("rope_parameters") or {})
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=fields["num_key_value_heads"],
        head_dim=head_dim,
        positions="rope" if fields["position_embedding_type"] == "rope" else "none",
        rope=rope,
        softmax_scale=None if scale == head_dim**-0.5 else scale,
    )


_GRANITE_SECOND = {
    "router.weight": "block_sparse_moe.router.layer.weight",
    "experts.up": "block_sparse_moe.input_linear.weight",
    "experts.down": "block_sparse_moe.output_linear.weight",
    "shared.up_proj.weight": "shared_mlp.input_linear.weight",
    "shared.down_proj.weight": "shared_mlp.output_linear.weight",
    "up_proj.weight": "shared_mlp.input_linear.weight",
    "down_proj.weight": "shared_mlp.output_linear.weight",
}


def granite_map(config: ModelConfig) -> WeightMap:
    """Build the weight map of a model that fits the class."""
    return paired_map(config, _BLOCKS, zeros={"E": _shared_zeros})


def mamba_entries(config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
    """Entries of Mamba2, named alike in other classes of pairs."""
    for name in block_shapes(config, "M"):
        other, form = CONV_FORMS.get(name, (name, "same"))
        yield WeightEntry(ours + name, (f"{layer}mamba.{other}",), form)


def _attention_entries(config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
    for name in block_shapes(config, "*"):
        yield WeightEntry(ours + name, (f"{layer}self_attn.{name}",))


def _second_entries(symbol: str, config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
    for name in block_shapes(config, symbol):
        yield WeightEntry(ours + name, (layer + _GRANITE_SECOND[name],))


def _shared_zeros(config: ModelConfig, layer: str) -> Zeros:
    """A shared expert of width 1 where ours has none."""
    assert config.moe is not None, "the pattern has E, the configuration no moe section"
    if config.moe.shared_expert_hidden_size:
        return {}
    return {
        f"{layer}shared_mlp.input_linear.weight": (2, config.hidden_size),
        f"{layer}shared_mlp.output_linear.weight": (config.hidden_size, 1),
    }


_BLOCKS: dict[str, BlockEntries] = {
    "M": mamba_entries,
    "*": _attention_entries,
    "E": partial(_second_entries, "E"),
    "-": partial(_second_entries, "-"),
}


def granite_refusals(config: ModelConfig, tokenizer_kind: str) -> list[Refusal]:
    """Name the programs that are known to reject a model of the class."""
    refusals = misses_sentencepiece("granitemoehybrid", tokenizer_kind)
    if config.mamba is None or "M" not in config.letters:
        return refusals
    return refusals + norms_groups_together(config.mamba.num_groups)


def _limits(config: ModelConfig) -> list[str]:
    of_states = [packed_rows("Mamba2")] if "M" in config.letters else []
    return [*of_states, NO_CLASSIFIER, IGNORED_ARGUMENTS]


CLASS = HfTarget(
    name="granitemoehybrid",
    model_type="granitemoehybrid",
    class_name="GraniteMoeHybridForCausalLM",
    unfit=unfit_for_granite,
    fields=granite_fields,
    read=model_config_from_granite,
    weights=granite_map,
    refusals=granite_refusals,
    limits=_limits,
)
