"""The transformers class `deepseek_v32`: deepseek_v3 whose latent attention reads the keys that an indexer chooses.

Read from transformers 5.24 (`configuration_deepseek_v32.py`, `modeling_deepseek_v32.py`). Queries come from a latent. The
indexer rotates as many channels of its heads as attention does, but pairs halves, where attention pairs neighbors. Of keys
with equal scores, such as 0, the class may choose others than ours.

The transformers class `glm_moe_dsa` (GLM-5): deepseek_v32 whose indexer pairs neighbors, as its attention does.

Read from transformers 5.24 (`configuration_glm_moe_dsa.py`, `modeling_glm_moe_dsa.py`). A layer of the class may take the keys that
an earlier layer chose (`indexer_types`); ours each choose their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from amfm.model.config.key_mixer_options import IndexerConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface import deepseek_v3
from amfm.model.huggingface.entries import WeightEntry, WeightMap
from amfm.model.huggingface.hf_class import no_refusals
from amfm.model.huggingface.latent.layers import (
    LAYER_TYPES,
    LatentClass,
    latent_options,
    mla_options,
    model_config_from_latent,
    unfit_blocks,
    unfit_layers,
)
from amfm.model.huggingface.latent.weights import RotaryEntry, latent_map
from amfm.model.huggingface.refusals import IGNORED_ARGUMENTS, Refusal

KIND = replace(deepseek_v3.KIND, name="deepseek_v32", class_name="DeepseekV32ForCausalLM")
QUERY, HEAD_WEIGHTS = "wq_b.weight", "weights_proj.weight"
# Ours and theirs, below the module of the indexer.
NAMES = {
    "query.weight": QUERY,
    "key.weight": "wk.weight",
    "key_norm.weight": "k_norm.weight",
    "key_norm.bias": "k_norm.bias",
    "head_weights.weight": HEAD_WEIGHTS,
}


def unfit_for_indexed(kind: LatentClass, config: ModelConfig) -> list[str]:
    """List every choice that a class with indexers cannot hold, as value, rule and fix."""
    name = kind.name
    reasons = unfit_layers(config, kind) + unfit_blocks(config, kind)
    if "+" not in config.letters:
        return reasons
    key, mla = "model.mixers.mla", mla_options(config)
    if mla.indexer is None:
        return [
            *reasons,
            f"{key}.indexer is missing: {name} chooses its keys; set it, or target deepseek_v3 or own",
        ]
    if mla.query_latent_size is None:
        reasons.append(f"{key}.query_latent_size is missing: {name} makes queries from a latent; set it, or target own")
    if mla.indexer.stage != "sparse":
        rule = f"{name} attends to the chosen keys; train with stage sparse, or target own"
        reasons.append(f"{key}.indexer.stage={mla.indexer.stage}: {rule}")
    if mla.indexer.head_dim * mla.indexer.rope_fraction != mla.rope_head_dim:
        rule = f"its indexer rotates rope_head_dim={mla.rope_head_dim} channels in {name}"
        remedy = f"use {mla.rope_head_dim} / head_dim, or target own"
        reasons.append(f"{key}.indexer.rope_fraction={mla.indexer.rope_fraction}: {rule}; {remedy}")
    return reasons


def indexed_fields(kind: LatentClass, config: ModelConfig) -> dict[str, Any]:
    """Build the fields of config.json that are the class's own."""
    indexer = latent_options(config).indexer
    assert indexer is not None, f"explain_unfit was not called: {kind.name} has an indexer"
    own = {
        "architectures": [kind.class_name],
        "model_type": kind.name,
        "index_topk": indexer.top_k,
        "index_head_dim": indexer.head_dim,
        "index_n_heads": indexer.num_heads,
    }
    return deepseek_v3.deepseek_v3_fields(config) | own


def model_config_from_indexed(kind: LatentClass, fields: Mapping[str, Any]) -> ModelConfig:
    """Build our configuration from config.json; ValueError for what our model has not."""
    size = fields["index_head_dim"]
    indexer = IndexerConfig(
        top_k=fields["index_topk"],
        num_heads=fields["index_n_heads"],
        head_dim=size,
        rope_fraction=fields["qk_rope_head_dim"] / size,
    )
    types = [LAYER_TYPES["+"]] * fields["num_hidden_layers"]
    section = deepseek_v3.read_positions(fields) | {"indexer": indexer}
    return model_config_from_latent(fields, kind, types, {"mla": section})


def indexed_map(config: ModelConfig, *, pairs_neighbors: bool = False) -> WeightMap:
    """Build the weight map of a model that fits the class; pairs_neighbors: its indexer rotates as its attention does."""
    found = latent_map(config, KIND)
    return replace(found, entries=(*found.entries, *_indexers(config, pairs_neighbors)))


def _indexers(config: ModelConfig, pairs_neighbors: bool) -> Iterator[WeightEntry]:
    indexer = latent_options(config).indexer
    for index, letter in enumerate(config.letters):
        for ours, theirs in NAMES.items() if letter == "+" else ():
            place = f"model.layers.{index // 2}.self_attn.indexer."
            entry = WeightEntry(f"blocks.{index}.mixer.indexer.{ours}", (f"{place}{theirs}",))
            if pairs_neighbors and indexer is not None and theirs != HEAD_WEIGHTS:
                heads, rotary = indexer.num_heads if theirs == QUERY else 1, latent_options(config).rope_head_dim
                entry = RotaryEntry(entry.ours, entry.theirs, heads=heads, rotary=rotary, is_first=True)
            yield entry


def _limits(config: ModelConfig) -> list[str]:
    return [IGNORED_ARGUMENTS, "transformers has no class for sequence classification of it (reward models)."]


def deepseek_v32_refusals(config: ModelConfig, tokenizer_kind: str) -> list[Refusal]:
    """Name the programs that are known to reject a model of the class."""
    rule = 'it chooses keys only on GPUs and ends with "Sparse Attention is not supported on CPU"; serve it from a GPU'
    return [*deepseek_v3.deepseek_refusals(config, tokenizer_kind), Refusal("vllm", rule)]


CLASS = replace(
    deepseek_v3.CLASS,
    name="deepseek_v32",
    model_type=KIND.name,
    class_name=KIND.class_name,
    unfit=partial(unfit_for_indexed, KIND),
    fields=partial(indexed_fields, KIND),
    length_names=(),
    read=partial(model_config_from_indexed, KIND),
    weights=indexed_map,
    refusals=deepseek_v32_refusals,
    limits=_limits,
    holds=frozenset(("indexer",)),
)


GLM_KIND = replace(KIND, name="glm_moe_dsa", class_name="GlmMoeDsaForCausalLM")


def glm_moe_dsa_fields(config: ModelConfig) -> dict[str, Any]:
    """Build the fields of config.json that are the class's own."""
    return indexed_fields(GLM_KIND, config) | {"indexer_types": ["full"] * (len(config.letters) // 2)}


def model_config_from_glm_moe_dsa(fields: Mapping[str, Any]) -> ModelConfig:
    """Build our configuration from config.json; ValueError for what our model has not."""
    kinds = set(fields["indexer_types"]) - {"full"}
    if kinds:
        rule = "each of our layers chooses its own keys; use a release whose layers are all full"
        raise ValueError(f"config.json: indexer_types={fields['indexer_types']} cannot be imported; {rule}")
    return model_config_from_indexed(GLM_KIND, fields)


GLM_CLASS = replace(
    CLASS,
    name="glm_moe_dsa",
    model_type=GLM_KIND.name,
    class_name=GLM_KIND.class_name,
    unfit=partial(unfit_for_indexed, GLM_KIND),
    fields=glm_moe_dsa_fields,
    read=model_config_from_glm_moe_dsa,
    weights=partial(indexed_map, pairs_neighbors=True),
    refusals=no_refusals,
)
