"""The transformers class `kimi_linear` (Kimi Delta Attention, latent attention without positions, experts).

Read from transformers 5.24 (`configuration_kimi_linear.py`, `modeling_kimi_linear.py`). Names of tensors are those of the
release, which transformers renames while loading.

The transformers class `bailing_hybrid` (Ling 3: Kimi Delta Attention with bounded decays, gated latent attention, experts).

Read from transformers 5.24 (`configuration_bailing_hybrid.py`, `modeling_bailing_hybrid.py`). Names of tensors are those of the
release, which transformers renames while loading. Layers of multi-token prediction after the last one are not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from amfm.model.config.mixer_options import KdaOptions
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.deepseek_v3 import fields_of, is_prediction_layer, read_positions
from amfm.model.huggingface.entries import Form, Piece, WeightEntry, WeightMap
from amfm.model.huggingface.hf_class import HfTarget
from amfm.model.huggingface.latent import (
    LAYER_TYPES,
    LatentClass,
    expert_fields,
    latent_fields,
    latent_map,
    latent_options,
    model_config_from_latent,
    unfit_blocks,
    unfit_layers,
)
from amfm.model.huggingface.qwen3_next_weights import RowsEntry
from amfm.model.huggingface.refusals import IGNORED_ARGUMENTS, NO_CLASSIFIER, Refusal, packed_rows
from amfm.model.on_demand import Shape

KIND = LatentClass(
    name="kimi_linear",
    class_name="KimiLinearForCausalLM",
    other="deepseek_v3",
    mixers="K+",
    positions="none",
    is_dense_first=False,
    ties_head=False,
    moe_place="block_sparse_moe",
    expert_matrices=("w1", "w3", "w2"),
    experts="num_experts",
    top_k="num_experts_per_token",
    shared="num_shared_experts",
    groups="num_expert_group",
    normalize="moe_renormalize",
)


def unfit_for_kimi_linear(config: ModelConfig) -> list[str]:
    """List every choice that the class cannot hold, as value, rule and fix."""
    delta = _unfit_delta(kda_options(config)) if "K" in config.letters else []
    return unfit_layers(config, KIND) + delta + unfit_blocks(config, KIND)


def _unfit_delta(options: KdaOptions) -> list[str]:
    key, reasons = "model.mixers.kda", []
    if options.value_dim() != options.key_dim():
        rule = f"values of kimi_linear are as wide as keys; use head_dim={options.key_dim()}"
        reasons.append(f"{key}.value_head_dim={options.value_dim()}: {rule}, or target own")
    if options.rank() != options.key_dim():
        rule = f"inside its gates kimi_linear is as wide as a head; use {options.key_dim()}"
        reasons.append(f"{key}.gate_rank={options.rank()}: {rule}, or target own")
    if options.allow_negative_eigenvalues:
        rule = "beta of kimi_linear is below 1; use false"
        reasons.append(f"{key}.allow_negative_eigenvalues=true: {rule}, or target own")
    if options.gates != "low_rank":
        reasons.append(
            f"{key}.gates=full: gates of kimi_linear are of low rank; use that, or target bailing_hybrid or own"
        )
    if options.decay_floor is not None:
        rule = "decays of kimi_linear have no bound; leave it out"
        reasons.append(f"{key}.decay_floor={options.decay_floor}: {rule}, or target bailing_hybrid or own")
    if not options.conv_kernel:
        reasons.append(f"{key}.conv_kernel=0: kimi_linear always convolves; use 2 to 4, or target own")
    return reasons


def kda_options(config: ModelConfig) -> KdaOptions:
    """Options of the Kimi Delta Attention blocks, which the pattern has."""
    options: KdaOptions = getattr(config.mixers, "kda")  # noqa: B009
    return options


def kimi_linear_fields(config: ModelConfig) -> dict[str, Any]:
    """Build the fields of config.json that are the class's own."""
    mixers, seconds = config.letters[0::2], config.letters[1::2]
    kinds = {"mlp_layer_types": ["sparse" if letter == "E" else "dense" for letter in seconds]}
    return latent_fields(config, KIND) | _delta_fields(config, mixers) | kinds | expert_fields(config, KIND)


def _delta_fields(config: ModelConfig, mixers: tuple[str, ...]) -> dict[str, Any]:
    """Kimi Delta Attention as the class has it, and as the released config.json, whose layers count from 1."""
    kda = kda_options(config) if "K" in mixers else KdaOptions(num_heads=1, head_dim=8)
    return {
        "layer_types": [LAYER_TYPES[letter] for letter in mixers],
        "linear_head_dim": kda.key_dim(),
        "linear_num_heads": kda.num_heads,
        "linear_conv_kernel_dim": kda.conv_kernel,
        "linear_attn_config": {
            "head_dim": kda.key_dim(),
            "num_heads": kda.num_heads,
            "short_conv_kernel_size": kda.conv_kernel,
            "kda_layers": [layer for layer, letter in enumerate(mixers, 1) if letter == "K"],
            "full_attn_layers": [layer for layer, letter in enumerate(mixers, 1) if letter == "+"],
        },
        "mla_use_nope": True,
        # What llama.cpp's converter and mlx-lm ask for, after the released config.json; the class has them fixed.
        "moe_router_activation_func": "sigmoid",
        "rope_theta": 10_000.0,
    }


def model_config_from_kimi_linear(fields: Mapping[str, Any]) -> ModelConfig:
    """Build our configuration from config.json; ValueError for what our model has not."""
    types, mixers = fields["layer_types"], {}
    if LAYER_TYPES["K"] in types:
        mixers["kda"] = {
            "num_heads": fields["linear_num_heads"],
            "head_dim": fields["linear_head_dim"],
            "conv_kernel": fields["linear_conv_kernel_dim"],
        }
    return model_config_from_latent(fields, KIND, types, mixers)


@dataclass(frozen=True)
class ConvEntry(RowsEntry):
    """Convolutions of several parts, [C, W], stored one by one as [C of the part, 1, W]."""

    part_form: ClassVar[Form] = "conv"

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """As in the base class."""
        return {name: part.unsqueeze(1) for name, part in super().split(tensor).items()}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As in the base class."""
        return super().join({name: tensors[name].squeeze(1) for name in self.theirs})


@dataclass(frozen=True)
class HeadsEntry(WeightEntry):
    """One number per head, [H], stored as [1, 1, H, 1]."""

    def pieces(self, shapes: Mapping[str, Shape]) -> Iterator[Piece]:
        """One piece."""
        yield self.whole_piece()

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """As in the base class."""
        return {self.theirs[0]: tensor.view(1, 1, -1, 1)}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As in the base class."""
        return tensors[self.theirs[0]].flatten()


def kimi_linear_map(config: ModelConfig) -> WeightMap:
    """Build the weight map of a model that fits the class."""
    return latent_map(config, KIND, _delta_entries)


def _delta_entries(config: ModelConfig, ours: str, theirs: str) -> Iterator[WeightEntry]:
    options = kda_options(config)
    inner, parts = options.num_heads * options.key_dim(), ("q", "k", "v", "b")
    names = tuple(f"{theirs}{part}_proj.weight" for part in parts)
    sizes = (inner, inner, inner, options.num_heads)
    yield RowsEntry(f"{ours}in_proj.weight", names, sizes=sizes, takes=((0,), (1,), (2,), (3,)))
    names = tuple(f"{theirs}{part}_a_proj.weight" for part in "fg")
    yield RowsEntry(f"{ours}shared_proj", names, sizes=(options.rank(), options.rank()), takes=((0,), (1,)))
    yield WeightEntry(f"{ours}decay_proj", (f"{theirs}f_b_proj.weight",))
    yield WeightEntry(f"{ours}gate_proj", (f"{theirs}g_b_proj.weight",))
    names = tuple(f"{theirs}{part}_conv1d.weight" for part in "qkv")
    yield ConvEntry(f"{ours}conv.weight", names, sizes=(inner,) * 3, takes=((0,), (1,), (2,)))
    yield HeadsEntry(f"{ours}A_log", (f"{theirs}A_log",))
    yield WeightEntry(f"{ours}dt_bias", (f"{theirs}dt_bias",))
    yield WeightEntry(f"{ours}norm.weight", (f"{theirs}o_norm.weight",))
    yield WeightEntry(f"{ours}out_proj.weight", (f"{theirs}o_proj.weight",))


def kimi_linear_refusals(config: ModelConfig, tokenizer_kind: str) -> list[Refusal]:
    """Name the programs that are known to reject a model of the class."""
    if "K" not in config.letters:
        return []
    rule = (
        'its delta attention is a kernel for GPUs and ends with "_lib_fn_wrapper object has no attribute get"; serve it '
        "from a GPU"
    )
    return [Refusal("vllm", rule)]


def _limits(config: ModelConfig) -> list[str]:
    of_states = [packed_rows("Kimi Delta Attention")] if "K" in config.letters else []
    return [*of_states, NO_CLASSIFIER, IGNORED_ARGUMENTS]


CLASS = HfTarget(
    name="kimi_linear",
    model_type="kimi_linear",
    class_name="KimiLinearForCausalLM",
    unfit=unfit_for_kimi_linear,
    fields=kimi_linear_fields,
    # What mlx-lm asks for.
    length_names=("model_max_length",),
    read=model_config_from_kimi_linear,
    weights=kimi_linear_map,
    refusals=kimi_linear_refusals,
    limits=_limits,
)


BAILING = "bailing_hybrid"
BAILING_KIND = LatentClass(
    name=BAILING,
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
    delta = list(_unfit_bounded_delta(config, kda_options(config))) if "K" in config.letters else []
    return unfit_layers(config, BAILING_KIND) + delta + unfit_blocks(config, BAILING_KIND)


def _unfit_bounded_delta(config: ModelConfig, options: KdaOptions) -> Iterator[str]:
    key = "model.mixers.kda"
    if options.value_dim() != options.key_dim():
        rule = f"values of {BAILING} are as wide as keys; use head_dim={options.key_dim()}"
        yield f"{key}.value_head_dim={options.value_dim()}: {rule}, or target own"
    if options.gates != "full":
        yield f"{key}.gates={options.gates}: gates of {BAILING} have whole matrices; use full, or target kimi_linear or own"
    if options.allow_negative_eigenvalues:
        yield f"{key}.allow_negative_eigenvalues=true: beta of {BAILING} is below 1; use false, or target own"
    if not options.conv_kernel:
        yield f"{key}.conv_kernel=0: {BAILING} always convolves; use 2 to 4, or target own"
    heads = latent_options(config).num_heads
    if "+" in config.letters and options.num_heads != heads:
        yield f"{key}.num_heads={options.num_heads}: heads of {BAILING} are as many in all layers; use {heads}, or target own"


def bailing_hybrid_fields(config: ModelConfig) -> dict[str, Any]:
    """Build the fields of config.json that are the class's own."""
    mixers, seconds = config.letters[0::2], config.letters[1::2]
    kda = kda_options(config) if "K" in mixers else KdaOptions(num_heads=1, head_dim=8, gates="full")
    fields = fields_of(config, BAILING_KIND)
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
    return model_config_from_latent(fields, BAILING_KIND, types, mixers)


def bailing_hybrid_map(config: ModelConfig) -> WeightMap:
    """Build the weight map of a model that fits the class, exact both ways."""
    found = latent_map(config, BAILING_KIND, _bounded_delta_entries)
    entries = (replace(entry, theirs=tuple(map(_released, entry.theirs))) for entry in found.entries)
    return replace(found, entries=tuple(entries), zeros={_released(name): shape for name, shape in found.zeros.items()})


def _released(name: str) -> str:
    """The name of a tensor in releases."""
    for inside, there in RENAMED.items():
        name = name.replace(inside, there)
    return name


def _bounded_delta_entries(config: ModelConfig, ours: str, theirs: str) -> Iterator[WeightEntry]:
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


def _bailing_limits(config: ModelConfig) -> list[str]:
    return [*([packed_rows("Kimi Delta Attention")] if "K" in config.letters else []), IGNORED_ARGUMENTS]


BAILING_CLASS = HfTarget(
    name="bailing_hybrid",
    model_type=BAILING,
    class_name="BailingHybridForCausalLM",
    unfit=unfit_for_bailing_hybrid,
    fields=bailing_hybrid_fields,
    length_names=("model_max_length",),
    read=model_config_from_bailing_hybrid,
    weights=bailing_hybrid_map,
    is_skipped=is_prediction_layer,
    limits=_bailing_limits,
)
