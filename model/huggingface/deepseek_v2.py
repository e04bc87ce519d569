"""The transformers class `deepseek_v2`: deepseek_v3 with a softmax router, whose groups are ranked by their best expert.

Read from transformers 5.24 (`configuration_deepseek_v2.py`, `modeling_deepseek_v2.py`). The class reads no `norm_topk_prob`: chosen
scores stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface import deepseek_v3
from amfm.model.huggingface.fields import require_fields
from amfm.model.huggingface.hf_class import nothing_skipped
from amfm.model.huggingface.latent.layers import (
    LAYER_TYPES,
    mla_options,
    model_config_from_latent,
    unfit_blocks,
    unfit_layers,
)
from amfm.model.huggingface.latent.weights import latent_map

KIND = replace(
    deepseek_v3.KIND,
    name="deepseek_v2",
    class_name="DeepseekV2ForCausalLM",
    normalize=None,
    router="softmax",
    group_score_top_k=1,
)
LIMITED = "group_limited_greedy"


def unfit_for_deepseek_v2(config: ModelConfig) -> list[str]:
    """List every choice that the class cannot hold, as value, rule and fix."""
    reasons = unfit_layers(config, KIND) + unfit_blocks(config, KIND)
    # The class looks at neighbors as complex numbers, in rows of which others come first.
    mla = mla_options(config) if "+" in config.letters else None
    for name in ("nope_head_dim", "latent_size") if mla is not None else ():
        if getattr(mla, name) % 2:
            rule = "deepseek_v2 rotates pairs in rows that begin with so many channels, which must be even"
            reasons.append(
                f"model.mixers.mla.{name}={getattr(mla, name)}: {rule}; add one, or target deepseek_v3 or own"
            )
    return reasons


def deepseek_v2_fields(config: ModelConfig) -> dict[str, Any]:
    """Build the fields of config.json that are the class's own."""
    own = {"architectures": [KIND.class_name], "model_type": KIND.name, "mlp_bias": False, "scoring_func": "softmax"}
    is_limited = config.moe is not None and config.moe.router_group_top_k < config.moe.num_router_groups
    own["topk_method"] = LIMITED if is_limited else "greedy"
    return deepseek_v3.fields_of(config, KIND) | own


def model_config_from_deepseek_v2(fields: Mapping[str, Any]) -> ModelConfig:
    """Build our configuration from config.json; ValueError for what our model has not."""
    require_fields(fields, {"mlp_bias": False})
    method = fields["topk_method"]
    if method not in ("greedy", LIMITED):
        raise ValueError(f"config.json: topk_method={method} cannot be imported; use greedy or {LIMITED}")
    found = dict(fields) if method == LIMITED else {**fields, "n_group": 1, "topk_group": 1}
    types = [LAYER_TYPES["+"]] * fields["num_hidden_layers"]
    return model_config_from_latent(found, KIND, types, {"mla": deepseek_v3.read_positions(fields)})


CLASS = replace(
    deepseek_v3.CLASS,
    name="deepseek_v2",
    model_type=KIND.name,
    class_name=KIND.class_name,
    unfit=unfit_for_deepseek_v2,
    fields=deepseek_v2_fields,
    length_names=(),
    read=model_config_from_deepseek_v2,
    weights=partial(latent_map, kind=KIND),
    is_skipped=nothing_skipped,
)
