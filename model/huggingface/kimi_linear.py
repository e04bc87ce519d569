"""The transformers class `kimi_linear` (Kimi Delta Attention, latent attention without positions, experts).

Read from transformers 5.24 (`configuration_kimi_linear.py`, `modeling_kimi_linear.py`). Names of tensors are those of the
release, which transformers renames while loading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from amfm.model.config.mixer_options import KdaOptions
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.entries import Form, Piece, WeightEntry, WeightMap
from amfm.model.huggingface.hf_class import HfTarget
from amfm.model.huggingface.latent.layers import (
    LAYER_TYPES,
    LatentClass,
    expert_fields,
    latent_fields,
    model_config_from_latent,
    unfit_blocks,
    unfit_layers,
)
from amfm.model.huggingface.latent.weights import latent_map
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
