"""The transformers class `deepseek_v3` (latent attention with rotary positions, experts behind dense layers).

Read from transformers 5.24 (`configuration_deepseek_v3.py`, `modeling_deepseek_v3.py`). The layers of multi-token prediction
that a checkpoint may have behind its last one are not among what is written or read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.entries import WeightMap
from amfm.model.huggingface.fields import require_fields
from amfm.model.huggingface.hf_class import HfTarget
from amfm.model.huggingface.latent.layers import (
    LAYER_TYPES,
    LatentClass,
    expert_fields,
    latent_fields,
    latent_options,
    model_config_from_latent,
    unfit_blocks,
    unfit_layers,
)
from amfm.model.huggingface.latent.weights import latent_map
from amfm.model.huggingface.limits import IGNORED_ARGUMENTS

KIND = LatentClass(
    name="deepseek_v3",
    class_name="DeepseekV3ForCausalLM",
    other="kimi_linear",
    mixers="+",
    positions="rope",
    is_dense_first=True,
    ties_head=True,
    moe_place="mlp",
    expert_matrices=("gate_proj", "up_proj", "down_proj"),
    experts="n_routed_experts",
    top_k="num_experts_per_tok",
    shared="n_shared_experts",
    groups="n_group",
    normalize="norm_topk_prob",
)


def unfit_for_deepseek_v3(config: ModelConfig) -> list[str]:
    """List every choice that the class cannot hold, as value, rule and remedy."""
    return unfit_layers(config, KIND) + unfit_blocks(config, KIND)


def deepseek_v3_fields(config: ModelConfig) -> dict[str, Any]:
    """Build the fields of config.json that are the class's own."""
    theta = latent_options(config).rope_theta
    own = {
        "rope_theta": theta,
        "rope_interleave": True,
        "num_nextn_predict_layers": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }
    return latent_fields(config, KIND) | own | expert_fields(config, KIND)


def model_config_from_deepseek_v3(fields: Mapping[str, Any]) -> ModelConfig:
    """Build our configuration from config.json; ValueError for what our model has not."""
    types = [LAYER_TYPES["+"]] * fields["num_hidden_layers"]
    return model_config_from_latent(fields, KIND, types, {"mla": {"rope_theta": rope_theta_of(fields)}})


def rope_theta_of(fields: Mapping[str, Any]) -> float:
    """Read the base of the rotation. Raises ValueError for one that is stretched."""
    rope = fields.get("rope_parameters") or {}
    require_fields(rope, {"rope_type": "default"})
    theta: float = rope.get("rope_theta", fields.get("rope_theta", 10_000.0))
    return theta


def is_prediction_layer(name: str, config: ModelConfig) -> bool:
    """Whether a tensor is of the layer behind a deepseek_v3's last one, which predicts further ahead and is not read here."""
    return name.startswith(f"model.layers.{len(config.letters) // 2}.")


def deepseek_v3_map(config: ModelConfig) -> WeightMap:
    """Build the weight map of a model that fits the class."""
    return latent_map(config, KIND)


def _limits(config: ModelConfig) -> list[str]:
    return [IGNORED_ARGUMENTS]


CLASS = HfTarget(
    name="deepseek_v3",
    model_type="deepseek_v3",
    class_name="DeepseekV3ForCausalLM",
    unfit=unfit_for_deepseek_v3,
    fields=deepseek_v3_fields,
    length_names=("model_max_length",),
    read=model_config_from_deepseek_v3,
    weights=deepseek_v3_map,
    is_skipped=is_prediction_layer,
    limits=_limits,
)
