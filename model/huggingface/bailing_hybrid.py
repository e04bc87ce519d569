"""The transformers class `bailing_hybrid` (Ling 3: Kimi Delta Attention with bounded decays, gated latent attention, experts).

Read from transformers 5.24 (`configuration_bailing_hybrid.py`, `modeling_bailing_hybrid.py`). Names of tensors are those of the
release, which transformers renames while loading. Layers of multi-token prediction after the last one are not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from amfm.model.config.mixer_options import KdaOptions
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.deepseek_v3 import fields_of, is_prediction_layer, read_positions
from amfm.model.huggingface.entries import WeightEntry, WeightMap
from amfm.model.huggingface.hf_class import HfTarget
from amfm.model.huggingface.kimi_linear import ConvEntry, kda_options
from amfm.model.huggingface.latent.layers import (
    LAYER_TYPES,
    LatentClass,
    latent_options,
    model_config_from_latent,
    unfit_blocks,
    unfit_layers,
)
from amfm.model.huggingface.latent.weights import latent_map
from amfm.model.huggingface.qwen3_next_weights import RowsEntry
from amfm.model.huggingface.refusals import IGNORED_ARGUMENTS, packed_rows

NAME = "bailing_hybrid"
KIND = LatentClass(
    name=NAME,
    class_name="BailingHybridForCausalLM",
    other="kimi_linear",
    mixers="K+",
    positions="rope",
    is_dense_first=False,
    ties_head=False,
    moe_place="mlp",
    expert_matrices=("gate_proj", "up_proj", "down_proj"),
    experts="num_experts",
    top_k="num_experts_per_token",
    shared="num_shared_experts",
    groups="num_expert_group",
    normalize="moe_renormalize",
    gate="head",
)
PARTS = ("q", "k", "v", "b", "f", "g")  # of our projection, in its order
# What is called otherwise in transformers, in the order of replacement.
RENAMED = {
    "model.embed_tokens.": "model.word_embeddings.",
    ".self_attn.o_proj.": ".self_attn.dense.",
    ".self_attn.": ".attention.",
    "gate.e_score_correction_bias": "gate.expert_bias",
}
FLOOR = -5.0  # of released models; config.json has one without bounds, too


def unfit_for_bailing_hybrid(config: ModelConfig) -> list[str]:
    """List every choice that the class cannot hold, as value, rule and fix."""
    delta = list(_unfit_delta(config, kda_options(config))) if "K" in config.letters else []
    return unfit_layers(config, KIND) + delta + unfit_blocks(config, KIND)


def _unfit_delta(config: ModelConfig, options: KdaOptions) -> Iterator[str]:
    key = "model.mixers.kda"
    if options.value_dim() != options.key_dim():
        rule = f"values of {NAME} are as wide as keys; use head_dim={options.key_dim()}"
        yield f"{key}.value_head_dim={options.value_dim()}: {rule}, or target own"
    if options.gates != "full":
        yield f"{key}.gates={options.gates}: gates of {NAME} have whole matrices; use full, or target kimi_linear or own"
    if options.allow_negative_eigenvalues:
        yield f"{key}.allow_negative_eigenvalues=true: beta of {NAME} is below 1; use false, or target own"
    if not options.conv_kernel:
        yield f"{key}.conv_kernel=0: {NAME} always convolves; use 2 to 4, or target own"
    heads = latent_options(config).num_heads
    if "+" in config.letters and options.num_heads != heads:
        yield f"{key}.num_heads={options.num_heads}: heads of {NAME} are as many in all layers; use {heads}, or target own"


def bailing_hybrid_fields(config: ModelConfig) -> dict[str, Any]:
    """Build the fields of config.json that are the class's own."""
    mixers, seconds = config.letters[0::2], config.letters[1::2]
    kda = kda_options(config) if "K" in mixers else KdaOptions(num_heads=1, head_dim=8, gates="full")
    fields = fields_of(config, KIND)
    del fields["rope_interleave"]  # always, and no field of the class
    if "+" not in mixers:
        fields |= {"num_attention_heads": kda.num_heads, "num_key_value_heads": kda.num_heads}
    return fields | {
        "layer_types": [LAYER_TYPES[letter] for letter in mixers],
        "mlp_layer_types": ["sparse" if letter == "E" else "dense" for letter in seconds],
        "head_dim": kda.key_dim(),
        "linear_head_dim": kda.key_dim(),
        "linear_num_heads": fields["num_attention_heads"],
        "short_conv_kernel_size": kda.conv_kernel,
        "linear_conv_kernel_dim": kda.conv_kernel,
        "kda_safe_gate": kda.decay_floor is not None,
        "kda_lower_bound": FLOOR if kda.decay_floor is None else kda.decay_floor,
    }


def model_config_from_bailing_hybrid(fields: Mapping[str, Any]) -> ModelConfig:
    """Build our configuration from config.json; ValueError for what our model has not."""
    types, mixers = fields["layer_types"], {"mla": read_positions(fields)}
    if LAYER_TYPES["K"] in types:
        mixers["kda"] = {
            "num_heads": fields["linear_num_heads"],
            "head_dim": fields["linear_head_dim"],
            "conv_kernel": fields["linear_conv_kernel_dim"],
            "gates": "full",
            "decay_floor": fields["kda_lower_bound"] if fields["kda_safe_gate"] else None,
        }
    return model_config_from_latent(fields, KIND, types, mixers)


def bailing_hybrid_map(config: ModelConfig) -> WeightMap:
    """Build the weight map of a model that fits the class, exact both ways."""
    found = latent_map(config, KIND, _delta_entries)
    entries = (replace(entry, theirs=tuple(map(_released, entry.theirs))) for entry in found.entries)
    return replace(found, entries=tuple(entries), zeros={_released(name): shape for name, shape in found.zeros.items()})


def _released(name: str) -> str:
    """The name of a tensor in releases."""
    for inside, there in RENAMED.items():
        name = name.replace(inside, there)
    return name


def _delta_entries(config: ModelConfig, ours: str, theirs: str) -> Iterator[WeightEntry]:
    options = kda_options(config)
    inner = options.num_heads * options.key_dim()
    sizes = (inner, inner, inner, options.num_heads, inner, inner)
    names = tuple(f"{theirs}{part}_proj.weight" for part in PARTS)
    yield RowsEntry(f"{ours}in_proj.weight", names, sizes=sizes, takes=tuple((part,) for part in range(len(PARTS))))
    names = tuple(f"{theirs}{part}_conv1d.weight" for part in PARTS[:3])
    yield ConvEntry(f"{ours}conv.weight", names, sizes=sizes[:3], takes=((0,), (1,), (2,)))
    for name, other in (
        ("A_log",) * 2,
        ("dt_bias",) * 2,
        ("norm.weight", "o_norm.weight"),
        ("out_proj.weight", "o_proj.weight"),
    ):
        yield WeightEntry(f"{ours}{name}", (f"{theirs}{other}",))


def _limits(config: ModelConfig) -> list[str]:
    return [*([packed_rows("Kimi Delta Attention")] if "K" in config.letters else []), IGNORED_ARGUMENTS]


CLASS = HfTarget(
    name="bailing_hybrid",
    model_type=NAME,
    class_name="BailingHybridForCausalLM",
    unfit=unfit_for_bailing_hybrid,
    fields=bailing_hybrid_fields,
    length_names=("model_max_length",),
    read=model_config_from_bailing_hybrid,
    weights=bailing_hybrid_map,
    is_skipped=is_prediction_layer,
    limits=_limits,
)
