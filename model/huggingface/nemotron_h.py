"""The transformers class `nemotron_h` (Mamba2, attention, experts or feed-forward in any order): which models fit it, and how.

Read from transformers 5.24 (`configuration_nemotron_h.py`, `modeling_nemotron_h.py`). A layer is one block after its norm, as
ours. Layer names are written in the older spelling (`mamba`, `attention`), which both older and newer readers take. Names of
tensors are those of the published checkpoints, some of which transformers renames while loading.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from amfm.model.config.core_options import AttentionConfig, FeedForwardConfig, Mamba2Config
from amfm.model.config.moe import MoeConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.depths import count_depths, depth_fields, nemotron_h_depths
from amfm.model.huggingface.entries import CONV_FORMS, WeightEntry, WeightMap
from amfm.model.huggingface.fields import (
    LAYER_NAMES,
    NO_QK_NORM,
    Wanted,
    letters_of,
    require_fields,
    unfit_expert_sizes,
    unfit_gates,
    unfit_mixers,
    unfit_multipliers,
    unfit_settings,
    unfit_softmax_scale,
)
from amfm.model.huggingface.hf_class import HfTarget
from amfm.model.huggingface.refusals import (
    IGNORED_ARGUMENTS,
    NO_ADAPTER_ON_OUTPUT,
    NO_CLASSIFIER,
    NO_EMBEDDINGS,
    NO_SQUARED_RELU_EXPERTS,
    OUR_CONVERTER,
    Refusal,
    misses_sentencepiece,
    packed_rows,
)
from amfm.model.shapes import block_shapes

# The class clamps dt at run time to at least `time_step_min`; training does not. 0 fails in its initialisation (log).
# `time_step_limit` is left at its default (0, infinity), which JSON cannot spell.
NO_CLAMP_TIME_STEP = 1e-30
# Classes that hold what this one does not.
EITHER = "granitemoehybrid or own"
EXPERTS: Wanted = {
    "activation": ("squared_relu", "experts are not gated"),
    "router": ("sigmoid", "a sigmoid scores experts"),
}
GROUPS: Wanted = {"group_score_top_k": (2, "groups are ranked by their two best experts")}
PLAIN: Wanted = {"activation": ("squared_relu", "the feed-forward is not gated")}
POSITIONS: Wanted = {"positions": ("none", "attention has no positions")}


def unfit_for_nemotron_h(config: ModelConfig) -> list[str]:
    """List every choice that the class cannot hold, as value, rule and fix."""
    letters = config.letters
    reasons = unfit_mixers(config, "nemotron_h") + unfit_gates(config, "nemotron_h")
    reasons += unfit_multipliers(config, "nemotron_h", other=EITHER)
    if "E" in letters and config.moe is not None:
        moe = config.moe
        reasons += unfit_settings("model.moe", moe, "nemotron_h", EXPERTS, EITHER)
        reasons += unfit_settings("model.moe", moe, "nemotron_h", GROUPS)
        if moe.num_experts < 2 * moe.num_router_groups:
            reasons.append(
                f"model.moe.num_experts={moe.num_experts} in num_router_groups={moe.num_router_groups}: nemotron_h ranks "
                "groups by their two best experts and needs two in each; use fewer groups or more experts, or target own"
            )
        reasons += unfit_expert_sizes(config, moe)
    if "-" in letters:
        reasons += unfit_settings("model.feed_forward", config.feed_forward, "nemotron_h", PLAIN)
    if "*" in letters and config.attention is not None:
        attention = config.attention
        reasons += unfit_settings("model.attention", attention, "nemotron_h", POSITIONS, EITHER)
        reasons += unfit_settings("model.attention", attention, "nemotron_h", NO_QK_NORM)
        reasons += unfit_softmax_scale(attention, "nemotron_h", EITHER)
    return reasons


def nemotron_h_fields(config: ModelConfig) -> dict[str, Any]:
    """Fields of Nemotron-H; those of blocks that the pattern lacks are left to the class's defaults."""
    letters = config.letters
    fields: dict[str, Any] = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "".join(letters),
        "layers_block_type": [LAYER_NAMES[letter] for letter in letters],
        # The class counts the names; llama.cpp's converter and mlx-lm ask for the number.
        "num_hidden_layers": len(letters),
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": False,
        "mlp_hidden_act": "relu2",
        "mlp_bias": False,
        "use_bias": False,
        "attention_bias": False,
        "mamba_proj_bias": False,
        "residual_in_fp32": config.residual_in_fp32,
        "rescale_prenorm_residual": False,
        "time_step_min": NO_CLAMP_TIME_STEP,
    }
    if config.mamba is not None:
        mamba = config.mamba
        fields |= {
            "mamba_num_heads": mamba.num_heads,
            "mamba_head_dim": mamba.head_dim,
            "ssm_state_size": mamba.state_size,
            "n_groups": mamba.num_groups,
            "conv_kernel": mamba.conv_kernel,
            "use_conv_bias": mamba.conv_bias,
            "chunk_size": mamba.chunk_size,
            "mamba_hidden_act": "silu",
        }
    if config.attention is not None:
        fields |= {
            "num_attention_heads": config.attention.num_heads,
            "num_key_value_heads": config.attention.num_kv_heads,
            "head_dim": config.attention.head_dim,
        }
    if config.feed_forward is not None:
        fields["intermediate_size"] = config.feed_forward.hidden_size
    if config.moe is not None:
        moe = config.moe
        fields |= {
            "n_routed_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.expert_hidden_size,
            "n_shared_experts": 1,
            "moe_shared_expert_intermediate_size": moe.shared_expert_hidden_size or 1,
            "moe_latent_size": moe.latent_size,
            "n_group": moe.num_router_groups,
            "topk_group": moe.router_group_top_k,
            "norm_topk_prob": moe.normalize_probabilities,
            "routed_scaling_factor": moe.routed_scaling,
        }
        # mlx-lm asks for it if no layer has it, too.
        fields.setdefault("intermediate_size", moe.expert_hidden_size)
    return fields | _depth_fields(config)


def _depth_fields(config: ModelConfig) -> dict[str, Any]:
    if not config.num_depths:
        return {}
    letters = config.parsed_pattern.depth_letters
    return depth_fields(config) | {
        "mtp_layers_block_type": [LAYER_NAMES[letter] for letter in letters],
        "mtp_hybrid_override_pattern": "".join(letters),
    }


def _depth_pattern(fields: Mapping[str, Any]) -> str:
    """The part of a pattern after the main blocks that config.json names, with its `/`; "" for no depths."""
    number = count_depths(fields)
    if not number:
        return ""
    names = fields.get("mtp_layers_block_type")
    letters = letters_of(list(names)) if names else list(fields["mtp_hybrid_override_pattern"])
    return f"/{''.join(letters)}" * number


def model_config_from_nemotron_h(fields: Mapping[str, Any]) -> ModelConfig:
    """Build our configuration from config.json; ValueError for what our model has not."""
    no_bias = {"use_bias": False, "mlp_bias": False, "attention_bias": False, "mamba_proj_bias": False}
    require_fields(fields, no_bias | {"mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "sliding_window": None})
    names = fields.get("layers_block_type") or fields.get("layer_types")
    main = "".join(letters_of(list(names)) if names else list(fields["hybrid_override_pattern"]))
    letters = main + _depth_pattern(fields)
    return ModelConfig(
        pattern=letters,
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        norm_epsilon=fields["layer_norm_epsilon"],
        tie_embeddings=False,
        initializer_range=fields["initializer_range"],
        residual_in_fp32=fields.get("residual_in_fp32", False),
        mamba=Mamba2Config(
            num_heads=fields["mamba_num_heads"],
            head_dim=fields["mamba_head_dim"],
            state_size=fields["ssm_state_size"],
            num_groups=fields["n_groups"],
            conv_kernel=fields["conv_kernel"],
            conv_bias=fields["use_conv_bias"],
            chunk_size=fields["chunk_size"],
        )
        if "M" in letters
        else None,
        attention=AttentionConfig(
            num_heads=fields["num_attention_heads"],
            num_kv_heads=fields["num_key_value_heads"],
            head_dim=fields["head_dim"],
        )
        if "*" in letters
        else None,
        feed_forward=FeedForwardConfig(hidden_size=fields["intermediate_size"], activation="squared_relu")
        if "-" in letters
        else None,
        moe=MoeConfig(
            num_experts=fields["n_routed_experts"],
            top_k=fields["num_experts_per_tok"],
            expert_hidden_size=fields["moe_intermediate_size"],
            shared_expert_hidden_size=fields["moe_shared_expert_intermediate_size"] or fields["intermediate_size"],
            activation="squared_relu",
            router="sigmoid",
            expert_bias=True,
            normalize_probabilities=fields["norm_topk_prob"],
            routed_scaling=float(fields["routed_scaling_factor"]),
            num_router_groups=fields["n_group"],
            router_group_top_k=fields["topk_group"],
            latent_size=fields["moe_latent_size"],
        )
        if "E" in letters
        else None,
    )


def nemotron_h_map(config: ModelConfig) -> WeightMap:
    """Build the weight map of a model that fits the class."""
    entries = [WeightEntry("embedding.weight", ("backbone.embeddings.weight",))]
    zeros: dict[str, tuple[int, ...]] = {}
    for index, letter in enumerate(config.letters):
        own, own_zeros = _nemotron_h_block(config, letter, f"blocks.{index}.", f"backbone.layers.{index}.")
        entries += own
        zeros |= own_zeros
    depths = nemotron_h_depths(config, partial(_nemotron_h_block, config))
    entries += depths.entries
    zeros |= depths.zeros
    entries.append(WeightEntry("final_norm.weight", ("backbone.norm_f.weight",)))
    # The class never ties its head: without its own copy of a tied weight it would start at random.
    tied = config.tie_embeddings
    entries.append(
        WeightEntry("embedding.weight" if tied else "head.weight", ("lm_head.weight",), "copy" if tied else "same")
    )
    return WeightMap(tuple(entries), zeros)


def _nemotron_h_block(
    config: ModelConfig, letter: str, ours: str, theirs: str
) -> tuple[list[WeightEntry], dict[str, tuple[int, ...]]]:
    """Entries of a block with its norm, and the tensors of it that are always zero."""
    entries = [WeightEntry(f"{ours}norm.weight", (f"{theirs}norm.weight",))]
    for name in block_shapes(config, letter):
        entries.append(_nemotron_h_entry(f"{ours}mixer.{name}", f"{theirs}mixer.", name, config))
    return entries, _nemotron_h_zeros(f"{theirs}mixer.", config) if letter == "E" else {}


_NEMOTRON_H_MOE = {
    "router.weight": "gate.weight",
    "expert_bias": "gate.e_score_correction_bias",
    "shared.up_proj.weight": "shared_experts.up_proj.weight",
    "shared.down_proj.weight": "shared_experts.down_proj.weight",
    "latent_down.weight": "fc1_latent_proj.weight",
    "latent_up.weight": "fc2_latent_proj.weight",
}


def _nemotron_h_entry(ours: str, theirs: str, name: str, config: ModelConfig) -> WeightEntry:
    if name in ("experts.up", "experts.down"):
        assert config.moe is not None, "experts without a moe section"
        suffix = "up_proj" if name == "experts.up" else "down_proj"
        names = tuple(f"{theirs}experts.{expert}.{suffix}.weight" for expert in range(config.moe.num_experts))
        return WeightEntry(ours, names, "experts")
    if name in CONV_FORMS:
        other, form = CONV_FORMS[name]
        return WeightEntry(ours, (theirs + other,), form)
    return WeightEntry(ours, (theirs + _NEMOTRON_H_MOE.get(name, name),))


def _nemotron_h_zeros(theirs: str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Tensors the class always has: a shared expert of width 1 and a routing bias, both zero if we have none."""
    moe, width = config.moe, config.hidden_size
    assert moe is not None, "the pattern has E, the configuration no moe section"
    zeros: dict[str, tuple[int, ...]] = {}
    if not moe.expert_bias:
        zeros[f"{theirs}gate.e_score_correction_bias"] = (moe.num_experts,)
    if not moe.shared_expert_hidden_size:
        zeros[f"{theirs}shared_experts.up_proj.weight"] = (1, width)
        zeros[f"{theirs}shared_experts.down_proj.weight"] = (width, 1)
    return zeros


def nemotron_h_refusals(config: ModelConfig, tokenizer_kind: str) -> list[Refusal]:
    """Name the programs that are known to reject a model of the class."""
    letters = config.letters
    refusals = misses_sentencepiece("nemotron_h", tokenizer_kind)
    if "E" not in letters:
        rule = (
            'its converter fills in experts that the model lacks and ends with "KeyError: moe_intermediate_size"; '
            + OUR_CONVERTER
        )
        refusals.append(Refusal("llama.cpp", rule, True))
    if "E" in letters and "-" in letters:
        rule = (
            "it converts a pattern with both E and - and then misses tensors when it loads the file; train without one of "
            "them for llama.cpp"
        )
        refusals.append(Refusal("llama.cpp", rule))
    if "E" in letters:
        refusals.append(Refusal("vllm", NO_SQUARED_RELU_EXPERTS))
    return refusals


def _tied_remark(config: ModelConfig) -> list[str]:
    if not config.tie_embeddings:
        return []
    return ["Embedding and head were trained as one matrix; the class cannot tie them, so the head is a copy."]


def _limits(config: ModelConfig) -> list[str]:
    of_mamba = [packed_rows("Mamba2"), NO_ADAPTER_ON_OUTPUT] if "M" in config.letters else []
    return [*of_mamba, NO_CLASSIFIER, NO_EMBEDDINGS, IGNORED_ARGUMENTS]


def _unfit_depths(config: ModelConfig) -> list[str]:
    """Every pattern of depths has its place."""
    return []


CLASS = HfTarget(
    name="nemotron_h",
    model_type="nemotron_h",
    class_name="NemotronHForCausalLM",
    unfit=unfit_for_nemotron_h,
    fields=nemotron_h_fields,
    read=model_config_from_nemotron_h,
    weights=nemotron_h_map,
    unfit_depths=_unfit_depths,
    refusals=nemotron_h_refusals,
    remarks=_tied_remark,
    limits=_limits,
)
