"""Which models of ours vLLM's parts can serve, by the fields of config.json; it imports nothing, and the export asks it too."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

# Of the modelling files whose config.json is read.
VERSION = 2
LETTERS = {
    "M": "mamba2",
    "*": "attention",
    "E": "moe",
    "-": "feed_forward",
    "C": "short_conv",
    "G": "gated_deltanet",
    "H": "hgrn2",
    "K": "kda",
    "L": "lightning",
    "P": "deltaproduct",
    "W": "window",
    "+": "mla",
}
SERVED = ("mamba2", "attention", "moe", "feed_forward", "short_conv", "gated_deltanet", "window", "mla")
# Blocks that keep a state of one size, and those that keep keys and values.
STATEFUL = ("mamba2", "short_conv", "gated_deltanet")
ATTENDING = ("attention", "window", "mla")

# Settings of each block that the plug-in reads, and those that matter only in training; another one that is set is rejected.
KNOWN = {
    "mamba2": "num_heads head_dim state_size num_groups conv_kernel conv_bias chunk_size keep_states a_init_min a_init_max "
    "time_step_min time_step_max time_step_floor",
    "attention": "num_heads num_kv_heads head_dim qk_norm positions rope softmax_scale gate",
    "feed_forward": "hidden_size activation linear_kind",
    "moe": "num_experts top_k expert_hidden_size shared_expert_hidden_size shared_expert_gate shared_expert_linear_kind "
    "activation router normalize_probabilities routed_scaling num_router_groups router_group_top_k group_score_top_k router_group_merit "
    "expert_bias bias_rule bias_update_rate auxiliary_loss_weight sequence_loss_weight balance_counts z_loss_weight latent_size "
    "capacity_factor overflow",
    "short_conv": "conv_kernel",
    "gated_deltanet": "conv_kernel chunk_size num_heads head_dim value_head_dim num_key_heads allow_negative_eigenvalues",
    "window": "num_heads num_kv_heads window head_dim qk_norm positions rope_theta gate",
    "mla": "num_heads latent_size query_latent_size nope_head_dim rope_head_dim value_head_dim positions rope_theta gate "
    "latent_norm_epsilon",
}
SECTIONS = {"mamba2": "mamba", "attention": "attention", "feed_forward": "feed_forward", "moe": "moe"}


def block_names(fields: Mapping[str, Any]) -> list[str]:
    """Name the block of each place of the pattern; of mixers side by side, which are not served, `(M&*)` itself."""
    symbols = re.findall(r"\([^)]*\)|\{[a-z0-9_]+\}|.", fields["pattern"])
    return [LETTERS.get(symbol, symbol.strip("{}")) for symbol in symbols]


def unserved(fields: Mapping[str, Any]) -> list[str]:
    """List what keeps vLLM from serving the model, block by block, each as block, rule and fix; empty: it is served."""
    names = set(block_names(fields))
    mixers = fields.get("mixers") or {}
    reasons = [f"the block {name}: vLLM has no part that it could run on" for name in sorted(names - {*SERVED, "kda"})]
    for name in sorted(names & set(SERVED)):
        section = fields[SECTIONS[name]] if name in SECTIONS else mixers[name]
        reasons += _unknown_settings(name, section)
    if fields.get("norm_kind") == "layernorm":
        reasons.append("norm_kind=layernorm: the plug-in has RMSNorms; use rmsnorm")
    if fields.get("norms_after") or fields.get("norm_placement") == "both":
        reasons.append("norm_placement: the plug-in norms what blocks read; use before")
    for name in ("attention_residuals", "hyper_connections"):
        if fields.get(name):
            reasons.append(f"{name}: blocks of the plug-in read the sum of all outputs; train without it")
    if "kda" in names:
        reasons.append("the block kda: vLLM's part for it needs a GPU, and was not tried")
    if "gated_deltanet" in names:
        reasons += _unserved_delta(mixers["gated_deltanet"])
    if "mla" in names:
        options = mixers["mla"]
        size = options["nope_head_dim"] + options["rope_head_dim"]
        if options["value_head_dim"] > size:
            reasons.append(
                f"the block mla: value_head_dim={options['value_head_dim']} is above the {size} of its keys, and its keys and "
                "values are in one cache; use narrower values"
            )
    return reasons


def _unknown_settings(name: str, section: Mapping[str, Any]) -> Iterator[str]:
    for key, value in section.items():
        if key not in KNOWN[name].split() and value not in (None, False, {}):
            shown = key if isinstance(value, Mapping) else f"{key}={value}"
            yield f"the block {name}: {shown}, which the plug-in does not compute; leave it out"
    if section.get("qk_norm") == "wide":
        yield f"the block {name}: qk_norm=wide, which the plug-in does not compute; use true"
    if (section.get("rope") or {}).get("scaling") == "linear":
        yield f"the block {name}: rope.scaling=linear, which the plug-in does not compute; use none"
    if (section.get("rope") or {}).get("yarn_truncate") is False:
        yield f"the block {name}: rope.yarn_truncate=false, which the plug-in does not compute; use true"
    if section.get("router", "sigmoid") not in ("softmax", "sigmoid", "sqrt_softplus"):
        yield f"the block {name}: router={section['router']}, which the plug-in does not compute"
    if section.get("activation", "swiglu") not in ("swiglu", "squared_relu"):
        yield f"the block {name}: activation={section['activation']}, which the plug-in does not compute; use swiglu"


def _unserved_delta(options: Mapping[str, Any]) -> Iterator[str]:
    if options.get("allow_negative_eigenvalues"):
        yield "the block gated_deltanet: allow_negative_eigenvalues=true, and beta of vLLM's part is below 1; use false"
    if not options["conv_kernel"]:
        yield "the block gated_deltanet: conv_kernel=0, and vLLM's part always convolves; use 2 to 4"


def attention_sizes(fields: Mapping[str, Any], name: str) -> tuple[int, int, int]:
    """Query heads, key heads and the size of a head of `attention`, `window` or `mla`."""
    if name == "attention":
        section = fields["attention"]
        return section["num_heads"], section["num_kv_heads"], section["head_dim"]
    options = fields["mixers"][name]
    if name == "mla":
        return options["num_heads"], options["num_heads"], options["nope_head_dim"] + options["rope_head_dim"]
    return options["num_heads"], options["num_kv_heads"] or options["num_heads"], options["head_dim"]
