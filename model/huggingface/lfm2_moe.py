"""The transformers class `lfm2_moe`: the layers of `lfm2`, whose later feed-forwards are mixtures of experts.

Read from transformers 5.24 (`configuration_lfm2_moe.py`, `modeling_lfm2_moe.py`). A sigmoid scores experts, a bias may steer the
choice, there is no shared expert. The class adds 1e-6 to the sum by which it divides chosen scores, which is below rounding
unless all of them are close to zero; names of tensors are those of the release, which transformers renames while loading.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amfm.model.config.core_options import FeedForwardConfig
from amfm.model.config.moe import MoeConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.fields import Wanted, unfit_expert_sizes, unfit_settings
from amfm.model.huggingface.hf_class import HfTarget
from amfm.model.huggingface.lfm2 import LAYER_TYPES, layer_fields, lfm2_map, limits, read_layers, refusals, unfit_layers

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


CLASS = HfTarget(
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
