"""The transformers class `deepseek_v3` (latent attention with rotary positions, experts after dense layers).

Read from transformers 5.24 (`configuration_deepseek_v3.py`, `modeling_deepseek_v3.py`). The layers of multi-token prediction
that a checkpoint may have after its last one are not among what is written or read here.

The transformers class `deepseek_v2`: deepseek_v3 with a softmax router, whose groups are ranked by their best expert.

Read from transformers 5.24 (`configuration_deepseek_v2.py`, `modeling_deepseek_v2.py`). The class reads no `norm_topk_prob`: chosen
scores stay as they are.

The transformers class `deepseek_v32`: deepseek_v3 whose latent attention reads the keys that an indexer chooses.

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
from amfm.model.config.rope import MlaYarn, yarn_of
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.entries import WeightEntry, WeightMap
from amfm.model.huggingface.fields import flat_rope_fields, parameters_of, require_fields, rope_from_parameters
from amfm.model.huggingface.hf_class import HfTarget, no_refusals, nothing_skipped
from amfm.model.huggingface.latent import (
    LAYER_TYPES,
    LatentClass,
    RotaryEntry,
    expert_fields,
    latent_fields,
    latent_map,
    latent_options,
    mla_options,
    model_config_from_latent,
    unfit_blocks,
    unfit_layers,
)
from amfm.model.huggingface.refusals import IGNORED_ARGUMENTS, OUR_CONVERTER, Refusal

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
    """List every choice that the class cannot hold, as value, rule and fix."""
    return unfit_layers(config, KIND) + unfit_blocks(config, KIND)


def deepseek_v3_fields(config: ModelConfig) -> dict[str, Any]:
    """Build the fields of config.json that are the class's own."""
    # The class has them fixed. Without them vLLM scores experts by a softmax and reads no biases, and llama.cpp rejects the file.
    return fields_of(config, KIND) | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def fields_of(config: ModelConfig, kind: LatentClass) -> dict[str, Any]:
    """The same of a class that is like it."""
    options = latent_options(config)
    parameters = parameters_of(options.rope(), options.rope_head_dim)
    if options.yarn is not None and options.yarn.mscale is not None:
        parameters |= {"mscale": options.yarn.mscale, "mscale_all_dim": options.yarn.mscale}
    own = {"rope_interleave": True, "num_nextn_predict_layers": 0, "rope_parameters": parameters}
    own |= flat_rope_fields(parameters)
    return latent_fields(config, kind) | own | expert_fields(config, kind)


def model_config_from_deepseek_v3(fields: Mapping[str, Any]) -> ModelConfig:
    """Build our configuration from config.json; ValueError for what our model has not."""
    types = [LAYER_TYPES["+"]] * fields["num_hidden_layers"]
    return model_config_from_latent(fields, KIND, types, {"mla": read_positions(fields)})


def read_positions(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Read the rotation as settings of latent attention. Raises ValueError for a stretch other than YaRN."""
    found = dict(fields.get("rope_parameters") or {})
    found.setdefault("rope_theta", fields.get("rope_theta", 10_000.0))
    mscale, of_all = found.pop("mscale", None), found.pop("mscale_all_dim", None)
    rope = rope_from_parameters(found)
    if rope.scaling not in ("none", "yarn"):
        rule = "cannot be imported with latent attention; use default or yarn"
        raise ValueError(f"config.json: rope_type={rope.scaling} {rule}")
    if (mscale or None) != (of_all or None):
        raise ValueError(
            f"config.json: mscale={mscale} and mscale_all_dim={of_all} cannot be imported; our latent attention has one number for "
            "both"
        )
    yarn = yarn_of(rope)
    section: dict[str, Any] = {"rope_theta": rope.theta}
    return section if yarn is None else section | {"yarn": MlaYarn(**yarn.model_dump(), mscale=mscale or None)}


def is_prediction_layer(name: str, config: ModelConfig) -> bool:
    """Whether a tensor is of the layer after a deepseek_v3's last one, which predicts further ahead and is not read here."""
    return name.startswith(f"model.layers.{len(config.letters) // 2}.")


def deepseek_v3_map(config: ModelConfig) -> WeightMap:
    """Build the weight map of a model that fits the class."""
    return latent_map(config, KIND)


def deepseek_refusals(config: ModelConfig, tokenizer_kind: str) -> list[Refusal]:
    """Name the programs that are known to reject a model of the class."""
    rule = f'its converter loads no class of DeepSeek and ends with "AttributeError: DSPARK_MARKOV_W1"; {OUR_CONVERTER}'
    return [Refusal("llama.cpp", rule, True)]


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
    refusals=deepseek_refusals,
    limits=_limits,
)


V2_KIND = replace(
    KIND,
    name="deepseek_v2",
    class_name="DeepseekV2ForCausalLM",
    normalize=None,
    router="softmax",
    group_score_top_k=1,
)
LIMITED = "group_limited_greedy"


def unfit_for_deepseek_v2(config: ModelConfig) -> list[str]:
    """List every choice that the class cannot hold, as value, rule and fix."""
    reasons = unfit_layers(config, V2_KIND) + unfit_blocks(config, V2_KIND)
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
    own = {
        "architectures": [V2_KIND.class_name],
        "model_type": V2_KIND.name,
        "mlp_bias": False,
        "scoring_func": "softmax",
    }
    is_limited = config.moe is not None and config.moe.router_group_top_k < config.moe.num_router_groups
    own["topk_method"] = LIMITED if is_limited else "greedy"
    return fields_of(config, V2_KIND) | own


def model_config_from_deepseek_v2(fields: Mapping[str, Any]) -> ModelConfig:
    """Build our configuration from config.json; ValueError for what our model has not."""
    require_fields(fields, {"mlp_bias": False})
    method = fields["topk_method"]
    if method not in ("greedy", LIMITED):
        raise ValueError(f"config.json: topk_method={method} cannot be imported; use greedy or {LIMITED}")
    found = dict(fields) if method == LIMITED else {**fields, "n_group": 1, "topk_group": 1}
    types = [LAYER_TYPES["+"]] * fields["num_hidden_layers"]
    return model_config_from_latent(found, V2_KIND, types, {"mla": read_positions(fields)})


V2_CLASS = replace(
    CLASS,
    name="deepseek_v2",
    model_type=V2_KIND.name,
    class_name=V2_KIND.class_name,
    unfit=unfit_for_deepseek_v2,
    fields=deepseek_v2_fields,
    length_names=(),
    read=model_config_from_deepseek_v2,
    weights=partial(latent_map, kind=V2_KIND),
    is_skipped=nothing_skipped,
)


V32_KIND = replace(KIND, name="deepseek_v32", class_name="DeepseekV32ForCausalLM")
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
    return deepseek_v3_fields(config) | own


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
    section = read_positions(fields) | {"indexer": indexer}
    return model_config_from_latent(fields, kind, types, {"mla": section})


def indexed_map(config: ModelConfig, *, pairs_neighbors: bool = False) -> WeightMap:
    """Build the weight map of a model that fits the class; pairs_neighbors: its indexer rotates as its attention does."""
    found = latent_map(config, V32_KIND)
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


def _indexer_limits(config: ModelConfig) -> list[str]:
    return [IGNORED_ARGUMENTS, "transformers has no class for sequence classification of it (reward models)."]


def deepseek_v32_refusals(config: ModelConfig, tokenizer_kind: str) -> list[Refusal]:
    """Name the programs that are known to reject a model of the class."""
    rule = 'it chooses keys only on GPUs and ends with "Sparse Attention is not supported on CPU"; serve it from a GPU'
    return [*deepseek_refusals(config, tokenizer_kind), Refusal("vllm", rule)]


V32_CLASS = replace(
    CLASS,
    name="deepseek_v32",
    model_type=V32_KIND.name,
    class_name=V32_KIND.class_name,
    unfit=partial(unfit_for_indexed, V32_KIND),
    fields=partial(indexed_fields, V32_KIND),
    length_names=(),
    read=partial(model_config_from_indexed, V32_KIND),
    weights=indexed_map,
    refusals=deepseek_v32_refusals,
    limits=_indexer_limits,
    holds=frozenset(("indexer",)),
)


GLM_KIND = replace(V32_KIND, name="glm_moe_dsa", class_name="GlmMoeDsaForCausalLM")


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
    V32_CLASS,
    name="glm_moe_dsa",
    model_type=GLM_KIND.name,
    class_name=GLM_KIND.class_name,
    unfit=partial(unfit_for_indexed, GLM_KIND),
    fields=glm_moe_dsa_fields,
    read=model_config_from_glm_moe_dsa,
    weights=partial(indexed_map, pairs_neighbors=True),
    refusals=no_refusals,
)
