"""Fields of config.json that released models of a class have and transformers 5.24 does not ask for, but other programs do.

Each function builds those of one class from the fields that config.json has so far.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Fields = Mapping[str, Any]


def none_missing(fields: Fields) -> dict[str, Any]:
    """Other programs find what they read."""
    return {}


def of_qwen3_moe(fields: Fields) -> dict[str, Any]:
    """The number of experts, which transformers 5 calls otherwise."""
    return {"num_experts": fields["num_local_experts"]}


def of_glm4_moe(fields: Fields) -> dict[str, Any]:
    """A rotation that is not scaled is said, too."""
    return {"rope_scaling": fields.get("rope_scaling")}


def of_minimax_m2(fields: Fields) -> dict[str, Any]:
    """How many channels of a head are rotated, the router, and that there is no shared expert."""
    return {
        "rotary_dim": _rotated(fields, fields["head_dim"]),
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_qk_norm": True,
        "shared_intermediate_size": 0,
    }


def of_hy_v3(fields: Fields) -> dict[str, Any]:
    """How many layers before the first with experts are dense, and what transformers calls otherwise."""
    types = fields["mlp_layer_types"]
    return {
        "first_k_dense_replace": types.index("sparse") if "sparse" in types else len(types),
        "expert_hidden_dim": fields["moe_intermediate_size"],
        "route_norm": True,
        "qk_norm": True,
    }


def of_bamba(fields: Fields) -> dict[str, Any]:
    """How many channels of a head are rotated."""
    return {"attn_rotary_emb": _rotated(fields, fields["hidden_size"] // fields["num_attention_heads"])}


def of_gemma3_text(fields: Fields) -> dict[str, Any]:
    """The bases of both rotations, and n where every n-th layer and no other has full attention."""
    ropes, types = fields["rope_parameters"], fields["layer_types"]
    found: dict[str, Any] = {
        "rope_theta": ropes["full_attention"]["rope_theta"],
        "rope_local_base_freq": ropes["sliding_attention"]["rope_theta"],
    }
    interval = full_attention_interval(types)
    return found if interval is None else found | {"sliding_window_pattern": interval}


def full_attention_interval(types: list[str]) -> int | None:
    """Find n where every n-th layer and no other has full attention; None where there is none."""
    for interval in range(1, len(types) + 1):
        if all((kind == "full_attention") == (layer % interval == 0) for layer, kind in enumerate(types, 1)):
            return interval
    return None


def _rotated(fields: Fields, head_dim: int) -> int:
    return int(head_dim * fields["rope_parameters"]["partial_rotary_factor"])


RELEASED: dict[str, Callable[[Fields], dict[str, Any]]] = {
    "qwen3_moe": of_qwen3_moe,
    "glm4_moe": of_glm4_moe,
    "minimax_m2": of_minimax_m2,
    "hy_v3": of_hy_v3,
    "bamba": of_bamba,
    "gemma3_text": of_gemma3_text,
}
