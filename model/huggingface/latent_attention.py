"""The transformers classes `kimi_linear` and `deepseek_v3`: which models fit them, and their config.json.

Read from transformers 5.24 (`configuration_kimi_linear.py`, `modeling_kimi_linear.py`, and those of `deepseek_v3`). Every layer
is a mixer and a feed-forward, each after a norm. Kimi Linear mixes by Kimi Delta Attention or by latent attention without
positions, DeepSeek-V3 by latent attention with rotary ones. Both have sigmoid routers with a bias and groups, and a shared
expert, which is zero where ours has none. Norms of latents have an epsilon of 1e-6 whatever `rms_norm_eps` says. The layers of
multi-token prediction that a deepseek_v3 may have behind its last one are not among what is written or read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amfm.model.config.mixer_options import KdaOptions, MlaOptions
from amfm.model.config.schema import FeedForwardConfig, ModelConfig, MoeConfig
from amfm.model.huggingface.fields import require_fields, unfit_expert_sizes, unfit_multipliers

LATENT_TARGETS = ("kimi_linear", "deepseek_v3")
LAYER_TYPES = {"K": "linear_attention", "+": "full_attention"}
LETTERS = {name: letter for letter, name in LAYER_TYPES.items()}
LATENT_EPSILON = 1e-6
MIXERS = {"kimi_linear": "K+", "deepseek_v3": "+"}
POSITIONS = {"kimi_linear": "none", "deepseek_v3": "rope"}


def unfit_for_latent(config: ModelConfig, target: str) -> list[str]:
    """List every choice that the class cannot hold, as value, rule and remedy."""
    letters = config.letters
    reasons = _unfit_layers(letters, target) + unfit_multipliers(config, target)
    reasons = [reason.replace("target granitemoehybrid or own", "target own") for reason in reasons]
    if "K" in letters and target == "kimi_linear":
        reasons += _unfit_delta(kda_options(config))
    if "+" in letters:
        reasons += _unfit_latents(mla_options(config), target)
    if "E" in letters and config.moe is not None:
        reasons += _unfit_experts(config, config.moe, target)
    if "-" in letters and config.feed_forward is not None and config.feed_forward.activation != "swiglu":
        reasons.append(
            f"model.feed_forward.activation={config.feed_forward.activation}: the feed-forward of {target} is gated; use "
            "swiglu, or target own"
        )
    return reasons


def _unfit_layers(letters: tuple[str, ...], target: str) -> list[str]:
    mixers, seconds = letters[0::2], letters[1::2]
    is_paired = len(mixers) == len(seconds) and set(mixers) <= set(MIXERS[target]) and set(seconds) <= set("E-")
    first_sparse = seconds.index("E") if "E" in seconds else len(seconds)
    if is_paired and (target == "kimi_linear" or "-" not in seconds[first_sparse:]):
        return []
    kinds = "K or +" if target == "kimi_linear" else "+"
    order = "" if target == "kimi_linear" else ", with all - before the first E"
    return [
        f"model.pattern={''.join(letters)}: layers of {target} are pairs, {kinds} and then E or -{order}; use such a "
        "pattern, or target own"
    ]


def _unfit_delta(options: KdaOptions) -> list[str]:
    key, reasons = "model.mixers.kda", []
    if options.value_dim() != options.key_dim():
        rule = f"values of kimi_linear are as wide as keys; use head_dim={options.key_dim()}"
        reasons.append(f"{key}.value_head_dim={options.value_dim()}: {rule}, or target own")
    if options.rank() != options.key_dim():
        rule = f"inside its gates kimi_linear is as wide as a head; use {options.key_dim()}"
        reasons.append(f"{key}.gate_rank={options.rank()}: {rule}, or target own")
    if options.allow_negative_eigenvalues:
        rule = "beta of kimi_linear is below 1; use false"
        reasons.append(f"{key}.allow_negative_eigenvalues=true: {rule}, or target own")
    if not options.conv_kernel:
        reasons.append(f"{key}.conv_kernel=0: kimi_linear always convolves; use 2 to 4, or target own")
    return reasons


def _unfit_latents(options: MlaOptions, target: str) -> list[str]:
    key, reasons = "model.mixers.mla", []
    if options.positions != POSITIONS[target]:
        other = "deepseek_v3" if target == "kimi_linear" else "kimi_linear"
        rule = f"latent attention of {target} has positions {POSITIONS[target]}"
        reasons.append(f"{key}.positions={options.positions}: {rule}; use that, or target {other} or own")
    if options.gate != "none":
        reasons.append(f"{key}.gate={options.gate}: latent attention of {target} has no gate; use none, or target own")
    if options.latent_norm_epsilon != LATENT_EPSILON:
        rule = f"norms of latents in {target} have {LATENT_EPSILON} whatever rms_norm_eps says; use that"
        reasons.append(f"{key}.latent_norm_epsilon={options.latent_norm_epsilon}: {rule}, or target own")
    return reasons


def _unfit_experts(config: ModelConfig, moe: MoeConfig, target: str) -> list[str]:
    reasons = []
    wanted = {
        "activation": ("swiglu", "its experts are gated"),
        "router": ("sigmoid", "it scores experts with a sigmoid"),
        "shared_expert_gate": (False, "its shared expert has no gate"),
        "latent_size": (None, "its experts read the full width"),
    }
    for name, (value, rule) in wanted.items():
        found = getattr(moe, name)
        if found != value:
            remedy = "leave it out" if value is None else f"use {str(value).lower()}"
            reasons.append(f"model.moe.{name}={str(found).lower()}: of {target}, {rule}; {remedy}, or target own")
    if moe.shared_expert_hidden_size % moe.expert_hidden_size:
        reasons.append(
            f"model.moe.shared_expert_hidden_size={moe.shared_expert_hidden_size}: the shared expert of {target} is as wide as "
            f"a whole number of routed ones; use a multiple of {moe.expert_hidden_size}, or target own"
        )
    if moe.num_experts < 2 * moe.num_router_groups:
        reasons.append(
            f"model.moe.num_experts={moe.num_experts} in num_router_groups={moe.num_router_groups}: {target} ranks groups by "
            "their two best experts and needs two in each; use fewer groups or more experts, or target own"
        )
    return reasons + unfit_expert_sizes(config, moe)


def kda_options(config: ModelConfig) -> KdaOptions:
    """Options of the Kimi Delta Attention blocks, which the pattern has."""
    options: KdaOptions = getattr(config.mixers, "kda")  # noqa: B009
    return options


def mla_options(config: ModelConfig) -> MlaOptions:
    """Options of the latent attention blocks, which the pattern has."""
    options: MlaOptions = getattr(config.mixers, "mla")  # noqa: B009
    return options


def latent_fields(config: ModelConfig, target: str) -> dict[str, Any]:
    """Build the fields of config.json that are the class's own; sizes of absent blocks are small ones that it takes."""
    letters = config.letters
    mixers, seconds = letters[0::2], letters[1::2]
    fields: dict[str, Any] = {
        "architectures": ["KimiLinearForCausalLM" if target == "kimi_linear" else "DeepseekV3ForCausalLM"],
        "model_type": target,
        "num_hidden_layers": len(mixers),
        "rms_norm_eps": config.norm_epsilon,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "first_k_dense_replace": seconds.index("E") if "E" in seconds else len(seconds),
        # Both classes read it; kimi_linear never ties its head and has a copy.
        "tie_word_embeddings": config.tie_embeddings and target == "deepseek_v3",
    }
    mla = mla_options(config) if "+" in letters else MlaOptions(num_heads=1, latent_size=8)
    fields |= {
        "num_attention_heads": mla.num_heads,
        "num_key_value_heads": mla.num_heads,
        "kv_lora_rank": mla.latent_size,
        "q_lora_rank": mla.query_latent_size,
        "qk_nope_head_dim": mla.nope_head_dim,
        "qk_rope_head_dim": mla.rope_head_dim,
        "v_head_dim": mla.value_head_dim,
        "head_dim": mla.rope_head_dim,
    }
    if target == "deepseek_v3":
        fields |= {"rope_theta": mla.rope_theta, "rope_interleave": True, "num_nextn_predict_layers": 0}
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": mla.rope_theta}
    else:
        fields |= _delta_fields(config, mixers)
        fields["mlp_layer_types"] = ["sparse" if letter == "E" else "dense" for letter in seconds]
    return fields | _expert_fields(config, target)


def _delta_fields(config: ModelConfig, mixers: tuple[str, ...]) -> dict[str, Any]:
    """Kimi Delta Attention as the class has it, and as the released config.json, whose layers count from 1."""
    kda = kda_options(config) if "K" in mixers else KdaOptions(num_heads=1, head_dim=8)
    return {
        "layer_types": [LAYER_TYPES[letter] for letter in mixers],
        "linear_head_dim": kda.key_dim(),
        "linear_num_heads": kda.num_heads,
        "linear_conv_kernel_dim": kda.conv_kernel,
        "linear_attn_config": {
            "head_dim": kda.key_dim(),
            "num_heads": kda.num_heads,
            "short_conv_kernel_size": kda.conv_kernel,
            "kda_layers": [layer for layer, letter in enumerate(mixers, 1) if letter == "K"],
            "full_attn_layers": [layer for layer, letter in enumerate(mixers, 1) if letter == "+"],
        },
        "mla_use_nope": True,
        # What llama.cpp's converter and mlx-lm ask for, after the released config.json; the class has them fixed.
        "moe_router_activation_func": "sigmoid",
        "rope_theta": 10_000.0,
    }


# What the two classes call the same things.
_EXPERT_NAMES: dict[str, dict[str, str]] = {
    "kimi_linear": {
        "experts": "num_experts",
        "top_k": "num_experts_per_token",
        "shared": "num_shared_experts",
        "groups": "num_expert_group",
        "normalize": "moe_renormalize",
    },
    "deepseek_v3": {
        "experts": "n_routed_experts",
        "top_k": "num_experts_per_tok",
        "shared": "n_shared_experts",
        "groups": "n_group",
        "normalize": "norm_topk_prob",
    },
}


def _expert_fields(config: ModelConfig, target: str) -> dict[str, Any]:
    names, moe = _EXPERT_NAMES[target], config.moe
    fields: dict[str, Any] = {}
    if config.feed_forward is not None:
        fields["intermediate_size"] = config.feed_forward.hidden_size
    if moe is None:
        # A class without sparse layers still has sizes for them.
        return fields | {names["experts"]: 2, names["top_k"]: 1, names["groups"]: 1, "topk_group": 1}
    fields.setdefault("intermediate_size", moe.expert_hidden_size)
    return fields | {
        names["experts"]: moe.num_experts,
        names["top_k"]: moe.top_k,
        names["shared"]: max(1, moe.shared_expert_hidden_size // moe.expert_hidden_size),
        names["groups"]: moe.num_router_groups,
        names["normalize"]: moe.normalize_probabilities,
        "topk_group": moe.router_group_top_k,
        "moe_intermediate_size": moe.expert_hidden_size,
        "routed_scaling_factor": moe.routed_scaling,
    }


def model_config_from_latent(fields: Mapping[str, Any], target: str) -> ModelConfig:
    """Build our configuration from config.json with the class's defaults filled in.

    Raises ValueError where the class uses something that our model does not have.
    """
    require_fields(fields, {"hidden_act": "silu", "attention_bias": False, "rope_interleave": True})
    if fields["num_key_value_heads"] != fields["num_attention_heads"]:
        raise ValueError(
            f"config.json: num_key_value_heads={fields['num_key_value_heads']} cannot be imported; latents are expanded to all "
            f"{fields['num_attention_heads']} heads"
        )
    layers = fields["num_hidden_layers"]
    dense = int(fields.get("first_k_dense_replace", 1))
    kinds = fields.get("mlp_layer_types") or ["dense" if layer < dense else "sparse" for layer in range(layers)]
    types = fields["layer_types"] if target == "kimi_linear" else ["full_attention"] * layers
    pattern = "".join(LETTERS[kind] + ("E" if mlp == "sparse" else "-") for kind, mlp in zip(types, kinds, strict=True))
    mixers: dict[str, Any] = {"mla": _mla_section(fields, target)} if "+" in pattern else {}
    if "K" in pattern:
        mixers["kda"] = {
            "num_heads": fields["linear_num_heads"],
            "head_dim": fields["linear_head_dim"],
            "conv_kernel": fields["linear_conv_kernel_dim"],
        }
    dense_size = fields["intermediate_size"]
    return ModelConfig.model_validate(
        {
            "pattern": pattern,
            "vocab_size": fields["vocab_size"],
            "hidden_size": fields["hidden_size"],
            "norm_epsilon": fields["rms_norm_eps"],
            "tie_embeddings": target == "deepseek_v3" and fields["tie_word_embeddings"],
            "initializer_range": fields["initializer_range"],
            "mixers": mixers,
            "moe": _moe(fields, target) if "E" in pattern else None,
            "feed_forward": FeedForwardConfig(hidden_size=dense_size, activation="swiglu") if "-" in pattern else None,
        }
    )


def is_prediction_layer(name: str, config: ModelConfig, target: str) -> bool:
    """Whether a tensor is of the layer behind a deepseek_v3's last one, which predicts further ahead and is not read here."""
    return target == "deepseek_v3" and name.startswith(f"model.layers.{len(config.letters) // 2}.")


def _mla_section(fields: Mapping[str, Any], target: str) -> dict[str, Any]:
    section = {
        "num_heads": fields["num_attention_heads"],
        "latent_size": fields["kv_lora_rank"],
        "query_latent_size": fields["q_lora_rank"],
        "nope_head_dim": fields["qk_nope_head_dim"],
        "rope_head_dim": fields["qk_rope_head_dim"],
        "value_head_dim": fields["v_head_dim"],
        "positions": POSITIONS[target],
    }
    if target == "deepseek_v3":
        rope = fields.get("rope_parameters") or {}
        require_fields(rope, {"rope_type": "default"})
        section["rope_theta"] = rope.get("rope_theta", fields.get("rope_theta", 10_000.0))
    return section


def _moe(fields: Mapping[str, Any], target: str) -> MoeConfig:
    names, width = _EXPERT_NAMES[target], fields["moe_intermediate_size"]
    return MoeConfig(
        num_experts=fields[names["experts"]],
        top_k=fields[names["top_k"]],
        expert_hidden_size=width,
        shared_expert_hidden_size=width * fields[names["shared"]],
        activation="swiglu",
        router="sigmoid",
        expert_bias=True,
        normalize_probabilities=fields[names["normalize"]],
        routed_scaling=float(fields["routed_scaling_factor"]),
        num_router_groups=fields[names["groups"]],
        router_group_top_k=fields["topk_group"],
    )
