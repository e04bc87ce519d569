"""What `kimi_linear`, `deepseek_v3` and `deepseek_v32` share: latent attention, sigmoid routers, layers of two blocks.

Read from transformers 5.24 (`modeling_kimi_linear.py`, `modeling_deepseek_v3.py`). Every layer is a mixer and a feed-forward,
each after a norm. Both have sigmoid routers with a bias and groups, and a shared expert, which is zero if ours has none.
Norms of latents have an epsilon of 1e-6 whatever `rms_norm_eps` says. What differs by name is in `LatentClass`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from amfm.model.config.core_options import FeedForwardConfig
from amfm.model.config.key_mixer_options import MlaOptions
from amfm.model.config.moe import MoeConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.fields import (
    GATED,
    Wanted,
    read_sizes,
    require_fields,
    unfit_expert_sizes,
    unfit_multipliers,
    unfit_settings,
)

LAYER_TYPES = {"K": "linear_attention", "+": "full_attention"}
LETTERS = {name: letter for letter, name in LAYER_TYPES.items()}
LATENT_EPSILON = 1e-6
# What a mixture of both classes must be.
EXPERTS: Wanted = {
    "activation": ("swiglu", "experts are gated"),
    "shared_expert_gate": (False, "the shared expert has no gate"),
    "latent_size": (None, "experts read the full width"),
}


@dataclass(frozen=True)
class LatentClass:
    """Names and choices of one of the two classes.

    mixers: letters of the blocks it has. positions: of its latent attention. other: the class with the other positions.
    is_dense_first: dense layers stand before sparse ones. ties_head: head and embedding may be one matrix. moe_place: the module
    of the experts. expert_matrices: gate, up and down of one expert. experts, top_k, shared, groups, normalize: fields of
    config.json; None: chosen scores stay as they are. router: what scores experts, a sigmoid with a bias. group_score_top_k: best
    experts that rank a group. gate: of latent attention.
    """

    name: str
    class_name: str
    other: str
    mixers: str
    positions: Literal["none", "rope"]
    is_dense_first: bool
    ties_head: bool
    moe_place: str
    expert_matrices: tuple[str, str, str]
    experts: str
    top_k: str
    shared: str
    groups: str
    normalize: str | None
    router: Literal["softmax", "sigmoid"] = "sigmoid"
    group_score_top_k: int = 2
    gate: Literal["none", "head"] = "none"


def unfit_layers(config: ModelConfig, kind: LatentClass) -> list[str]:
    """List what the class has not around its blocks: other layers, constant factors."""
    letters = config.letters
    mixers, seconds = letters[0::2], letters[1::2]
    is_paired = len(mixers) == len(seconds) and set(mixers) <= set(kind.mixers) and set(seconds) <= set("E-")
    first_sparse = seconds.index("E") if "E" in seconds else len(seconds)
    reasons = unfit_multipliers(config, kind.name)
    if is_paired and not (kind.is_dense_first and "-" in seconds[first_sparse:]):
        return reasons
    order = ", with all - before the first E" if kind.is_dense_first else ""
    wrong = (
        f"model.pattern={''.join(letters)}: layers of {kind.name} are pairs, {' or '.join(kind.mixers)} and then E or -{order}; "
        "use such a pattern, or target own"
    )
    return [wrong, *reasons]


def unfit_blocks(config: ModelConfig, kind: LatentClass) -> list[str]:
    """List what the blocks that both classes have cannot hold."""
    letters = config.letters
    reasons = _unfit_latents(mla_options(config), kind) if "+" in letters else []
    if "E" in letters and config.moe is not None:
        reasons += _unfit_experts(config, config.moe, kind)
    if "-" in letters:
        reasons += unfit_settings("model.feed_forward", config.feed_forward, kind.name, GATED)
    return reasons


def _unfit_latents(options: MlaOptions, kind: LatentClass) -> list[str]:
    key, target, reasons = "model.mixers.mla", kind.name, []
    if options.positions != kind.positions:
        rule = f"latent attention of {target} has positions {kind.positions}"
        reasons.append(f"{key}.positions={options.positions}: {rule}; use that, or target {kind.other} or own")
    if options.gate != kind.gate:
        rule = (
            f"latent attention of {target} has {'no gate' if kind.gate == 'none' else 'a gate a head'}; use {kind.gate}"
        )
        reasons.append(f"{key}.gate={options.gate}: {rule}, or target own")
    if options.latent_norm_epsilon != LATENT_EPSILON:
        rule = f"norms of latents in {target} have {LATENT_EPSILON} whatever rms_norm_eps states; use that"
        reasons.append(f"{key}.latent_norm_epsilon={options.latent_norm_epsilon}: {rule}, or target own")
    return reasons


def _unfit_experts(config: ModelConfig, moe: MoeConfig, kind: LatentClass) -> list[str]:
    target, ranked = kind.name, kind.group_score_top_k
    wanted = dict(EXPERTS) | {"router": (kind.router, f"a {kind.router} scores experts")}
    if moe.router_group_top_k < moe.num_router_groups:
        wanted["group_score_top_k"] = (ranked, f"groups are ranked by {ranked} of their best experts")
    if kind.normalize is None:
        wanted["normalize_probabilities"] = (False, "chosen scores are not divided by their sum")
    reasons = unfit_settings("model.moe", moe, target, wanted)
    if moe.shared_expert_hidden_size % moe.expert_hidden_size:
        reasons.append(
            f"model.moe.shared_expert_hidden_size={moe.shared_expert_hidden_size}: the shared expert of {target} is as wide as "
            f"a whole number of routed ones; use a multiple of {moe.expert_hidden_size}, or target own"
        )
    if moe.num_experts < ranked * moe.num_router_groups:
        reasons.append(
            f"model.moe.num_experts={moe.num_experts} in num_router_groups={moe.num_router_groups}: {target} ranks groups by "
            f"{ranked} of their best experts and needs so many in each; use fewer groups or more experts, or target own"
        )
    return reasons + unfit_expert_sizes(config, moe)


def mla_options(config: ModelConfig) -> MlaOptions:
    """Options of the latent attention blocks, which the pattern has."""
    options: MlaOptions = getattr(config.mixers, "mla")  # noqa: B009
    return options


def latent_options(config: ModelConfig) -> MlaOptions:
    """Options of the latent attention blocks, or small ones that the classes take where the pattern has none."""
    return mla_options(config) if "+" in config.letters else MlaOptions(num_heads=1, latent_size=8)


def latent_fields(config: ModelConfig, kind: LatentClass) -> dict[str, Any]:
    """Build the fields of config.json that both classes have; sizes of absent blocks are small ones that they take."""
    letters = config.letters
    mixers, seconds = letters[0::2], letters[1::2]
    fields: dict[str, Any] = {
        "architectures": [kind.class_name],
        "model_type": kind.name,
        "num_hidden_layers": len(mixers),
        "rms_norm_eps": config.norm_epsilon,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "first_k_dense_replace": seconds.index("E") if "E" in seconds else len(seconds),
        # Both classes read it; kimi_linear never ties its head and has a copy.
        "tie_word_embeddings": config.tie_embeddings and kind.ties_head,
    }
    mla = latent_options(config)
    return fields | {
        "num_attention_heads": mla.num_heads,
        "num_key_value_heads": mla.num_heads,
        "kv_lora_rank": mla.latent_size,
        "q_lora_rank": mla.query_latent_size,
        "qk_nope_head_dim": mla.nope_head_dim,
        "qk_rope_head_dim": mla.rope_head_dim,
        "v_head_dim": mla.value_head_dim,
        "head_dim": mla.rope_head_dim,
    }


def expert_fields(config: ModelConfig, kind: LatentClass) -> dict[str, Any]:
    """Build the fields of feed-forward and experts, which stand last."""
    moe = config.moe
    fields: dict[str, Any] = {}
    if config.feed_forward is not None:
        fields["intermediate_size"] = config.feed_forward.hidden_size
    if moe is None:
        # A class without sparse layers still has sizes for them.
        return fields | {kind.experts: 2, kind.top_k: 1, kind.groups: 1, "topk_group": 1}
    fields.setdefault("intermediate_size", moe.expert_hidden_size)
    return fields | {
        kind.experts: moe.num_experts,
        kind.top_k: moe.top_k,
        kind.shared: max(1, moe.shared_expert_hidden_size // moe.expert_hidden_size),
        kind.groups: moe.num_router_groups,
        **({} if kind.normalize is None else {kind.normalize: moe.normalize_probabilities}),
        "topk_group": moe.router_group_top_k,
        "moe_intermediate_size": moe.expert_hidden_size,
        "routed_scaling_factor": moe.routed_scaling,
    }


def model_config_from_latent(
    fields: Mapping[str, Any], kind: LatentClass, types: Sequence[str], mixers: Mapping[str, Any]
) -> ModelConfig:
    """Build our configuration from config.json with the class's defaults filled in.

    types: of the layers' mixers. mixers: sections of those besides latent attention, and what that has besides sizes.
    Raises ValueError if the class uses something that our model does not have.
    """
    require_fields(fields, {"hidden_act": "silu", "attention_bias": False, "rope_interleave": True})
    if fields["num_key_value_heads"] != fields["num_attention_heads"]:
        raise ValueError(
            f"config.json: num_key_value_heads={fields['num_key_value_heads']} cannot be imported; latents are expanded to all "
            f"{fields['num_attention_heads']} heads"
        )
    layers = fields["num_hidden_layers"]
    dense = int(fields.get("first_k_dense_replace", 1))
    seconds = fields.get("mlp_layer_types") or ["dense" if layer < dense else "sparse" for layer in range(layers)]
    pattern = "".join(
        LETTERS[mixer] + ("E" if mlp == "sparse" else "-") for mixer, mlp in zip(types, seconds, strict=True)
    )
    sections = {name: section for name, section in mixers.items() if name != "mla"}
    if "+" in pattern:
        sections["mla"] = _mla_section(fields, kind) | mixers.get("mla", {})
    dense_size = fields["intermediate_size"]
    return ModelConfig.model_validate(
        {
            "pattern": pattern,
            **read_sizes(fields),
            "tie_embeddings": kind.ties_head and fields["tie_word_embeddings"],
            "mixers": sections,
            "moe": _moe(fields, kind) if "E" in pattern else None,
            "feed_forward": FeedForwardConfig(hidden_size=dense_size, activation="swiglu") if "-" in pattern else None,
        }
    )


def _mla_section(fields: Mapping[str, Any], kind: LatentClass) -> dict[str, Any]:
    return {
        "num_heads": fields["num_attention_heads"],
        "latent_size": fields["kv_lora_rank"],
        "query_latent_size": fields["q_lora_rank"],
        "nope_head_dim": fields["qk_nope_head_dim"],
        "rope_head_dim": fields["qk_rope_head_dim"],
        "value_head_dim": fields["v_head_dim"],
        "positions": kind.positions,
        "gate": kind.gate,
    }


def _moe(fields: Mapping[str, Any], kind: LatentClass) -> MoeConfig:
    width = fields["moe_intermediate_size"]
    return MoeConfig(
        num_experts=fields[kind.experts],
        top_k=fields[kind.top_k],
        expert_hidden_size=width,
        shared_expert_hidden_size=width * fields[kind.shared],
        activation="swiglu",
        router=kind.router,
        expert_bias=kind.router == "sigmoid",
        normalize_probabilities=kind.normalize is not None and fields[kind.normalize],
        routed_scaling=float(fields["routed_scaling_factor"]),
        num_router_groups=fields[kind.groups] or 1,
        router_group_top_k=fields["topk_group"] or 1,
        group_score_top_k=kind.group_score_top_k if (fields[kind.groups] or 1) > (fields["topk_group"] or 1) else 2,
    )
