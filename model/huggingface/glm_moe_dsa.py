"""The transformers class `glm_moe_dsa` (GLM-5): deepseek_v32 whose indexer pairs neighbors, as its attention does.

Read from transformers 5.24 (`configuration_glm_moe_dsa.py`, `modeling_glm_moe_dsa.py`). A layer of the class may take the keys that
an earlier layer chose (`indexer_types`); ours each choose their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.deepseek_v32 import target as deepseek_v32
from amfm.model.huggingface.hf_class import no_refusals

KIND = replace(deepseek_v32.KIND, name="glm_moe_dsa", class_name="GlmMoeDsaForCausalLM")


def glm_moe_dsa_fields(config: ModelConfig) -> dict[str, Any]:
    """Build the fields of config.json that are the class's own."""
    return deepseek_v32.indexed_fields(KIND, config) | {"indexer_types": ["full"] * (len(config.letters) // 2)}


def model_config_from_glm_moe_dsa(fields: Mapping[str, Any]) -> ModelConfig:
    """Build our configuration from config.json; ValueError for what our model has not."""
    kinds = set(fields["indexer_types"]) - {"full"}
    if kinds:
        rule = "each of our layers chooses its own keys; use a release whose layers are all full"
        raise ValueError(f"config.json: indexer_types={fields['indexer_types']} cannot be imported; {rule}")
    return deepseek_v32.model_config_from_indexed(KIND, fields)


CLASS = replace(
    deepseek_v32.CLASS,
    name="glm_moe_dsa",
    model_type=KIND.name,
    class_name=KIND.class_name,
    unfit=partial(deepseek_v32.unfit_for_indexed, KIND),
    fields=glm_moe_dsa_fields,
    read=model_config_from_glm_moe_dsa,
    weights=partial(deepseek_v32.indexed_map, pairs_neighbors=True),
    refusals=no_refusals,
)
