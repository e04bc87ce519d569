"""What `kimi_linear`, `deepseek_v3` and `deepseek_v32` share: latent attention, sigmoid routers, layers of two blocks.

Read from transformers 5.24 (`modeling_kimi_linear.py`, `modeling_deepseek_v3.py`). Every layer is a mixer and a feed-forward,
each after a norm. Both have sigmoid routers with a bias and groups, and a shared expert, which is zero if ours has none.
Norms of latents have an epsilon of 1e-6 whatever `rms_norm_eps` says. What differs by name is in `LatentClass`.

What the weight maps of transformers' `kimi_linear` and `deepseek_v3` share, exact both ways.

DeepSeek-V3 rotates neighbouring channels where ours rotate a channel of the first half with one of the second, so that rows
which give rotary channels change places (`RotaryEntry`): the released order, which every reader takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from amfm.model.config.core_options import FeedForwardConfig
from amfm.model.config.key_mixer_options import MlaOptions
from amfm.model.config.moe import MoeConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.entries import BlockEntries, Piece, WeightEntry, WeightMap, Zeros, paired_map
from amfm.model.huggingface.fields import (
    GATED,
    Wanted,
    read_sizes,
    require_fields,
    unfit_expert_sizes,
    unfit_multipliers,
    unfit_settings,
)
from amfm.model.huggingface.qwen3_next_weights import GatedEntry, gated_experts
from amfm.model.on_demand import Shape, cut_rows

LAYER_TYPES = {"K": "linear_attention", "+": "full_attention"}
LETTERS = {name: letter for letter, name in LAYER_TYPES.items()}
LATENT_EPSILON = 1e-6
# What a mixture of both classes must be.
EXPERTS: Wanted = {
    "activation": ("swiglu", "experts are gated"),
    "shared_expert_gate": (False, "the shared expert has no gate"),
    "latent_size": (None, "experts read the full width"),
}


@dataclass(frozen=True)
class LatentClass:
    """Names and choices of one of the two classes.

    mixers: letters of the blocks it has. positions: of its latent attention. other: the class with the other positions.
    is_dense_first: dense layers stand before sparse ones. ties_head: head and embedding may be one matrix. moe_place: the module
    of the experts. expert_matrices: gate, up and down of one expert. experts, top_k, shared, groups, normalize: fields of
    config.json; None: chosen scores stay as they are. router: what scores experts, a sigmoid with a bias. group_score_top_k: best
    experts that rank a group. gate: of latent attention.
    """

    name: str
    class_name: str
    other: str
    mixers: str
    positions: Literal["none", "rope"]
    is_dense_first: bool
    ties_head: bool
    moe_place: str
    expert_matrices: tuple[str, str, str]
    experts: str
    top_k: str
    shared: str
    groups: str
    normalize: str | None
    router: Literal["softmax", "sigmoid"] = "sigmoid"
    group_score_top_k: int = 2
    gate: Literal["none", "head"] = "none"


def unfit_layers(config: ModelConfig, kind: LatentClass) -> list[str]:
    """List what the class has not around its blocks: other layers, constant factors."""
    letters = config.letters
    mixers, seconds = letters[0::2], letters[1::2]
    is_paired = len(mixers) == len(seconds) and set(mixers) <= set(kind.mixers) and set(seconds) <= set("E-")
    first_sparse = seconds.index("E") if "E" in seconds else len(seconds)
    reasons = unfit_multipliers(config, kind.name)
    if is_paired and not (kind.is_dense_first and "-" in seconds[first_sparse:]):
        return reasons
    order = ", with all - before the first E" if kind.is_dense_first else ""
    wrong = (
        f"model.pattern={''.join(letters)}: layers of {kind.name} are pairs, {' or '.join(kind.mixers)} and then E or -{order}; "
        "use such a pattern, or target own"
    )
    return [wrong, *reasons]


def unfit_blocks(config: ModelConfig, kind: LatentClass) -> list[str]:
    """List what the blocks that both classes have cannot hold."""
    letters = config.letters
    reasons = _unfit_latents(mla_options(config), kind) if "+" in letters else []
    if "E" in letters and config.moe is not None:
        reasons += _unfit_experts(config, config.moe, kind)
    if "-" in letters:
        reasons += unfit_settings("model.feed_forward", config.feed_forward, kind.name, GATED)
    return reasons


def _unfit_latents(options: MlaOptions, kind: LatentClass) -> list[str]:
    key, target, reasons = "model.mixers.mla", kind.name, []
    if options.positions != kind.positions:
        rule = f"latent attention of {target} has positions {kind.positions}"
        reasons.append(f"{key}.positions={options.positions}: {rule}; use that, or target {kind.other} or own")
    if options.gate != kind.gate:
        rule = (
            f"latent attention of {target} has {'no gate' if kind.gate == 'none' else 'a gate a head'}; use {kind.gate}"
        )
        reasons.append(f"{key}.gate={options.gate}: {rule}, or target own")
    if options.latent_norm_epsilon != LATENT_EPSILON:
        rule = f"norms of latents in {target} have {LATENT_EPSILON} whatever rms_norm_eps states; use that"
        reasons.append(f"{key}.latent_norm_epsilon={options.latent_norm_epsilon}: {rule}, or target own")
    return reasons


def _unfit_experts(config: ModelConfig, moe: MoeConfig, kind: LatentClass) -> list[str]:
    target, ranked = kind.name, kind.group_score_top_k
    wanted = dict(EXPERTS) | {"router": (kind.router, f"a {kind.router} scores experts")}
    if moe.router_group_top_k < moe.num_router_groups:
        wanted["group_score_top_k"] = (ranked, f"groups are ranked by {ranked} of their best experts")
    if kind.normalize is None:
        wanted["normalize_probabilities"] = (False, "chosen scores are not divided by their sum")
    reasons = unfit_settings("model.moe", moe, target, wanted)
    if moe.shared_expert_hidden_size % moe.expert_hidden_size:
        reasons.append(
            f"model.moe.shared_expert_hidden_size={moe.shared_expert_hidden_size}: the shared expert of {target} is as wide as "
            f"a whole number of routed ones; use a multiple of {moe.expert_hidden_size}, or target own"
        )
    if moe.num_experts < ranked * moe.num_router_groups:
        reasons.append(
            f"model.moe.num_experts={moe.num_experts} in num_router_groups={moe.num_router_groups}: {target} ranks groups by "
            f"{ranked} of their best experts and needs so many in each; use fewer groups or more experts, or target own"
        )
    return reasons + unfit_expert_sizes(config, moe)


def mla_options(config: ModelConfig) -> MlaOptions:
    """Options of the latent attention blocks, which the pattern has."""
    options: MlaOptions = getattr(config.mixers, "mla")  # noqa: B009
    return options


def latent_options(config: ModelConfig) -> MlaOptions:
    """Options of the latent attention blocks, or small ones that the classes take where the pattern has none."""
    return mla_options(config) if "+" in config.letters else MlaOptions(num_heads=1, latent_size=8)


def latent_fields(config: ModelConfig, kind: LatentClass) -> dict[str, Any]:
    """Build the fields of config.json that both classes have; sizes of absent blocks are small ones that they take."""
    letters = config.letters
    mixers, seconds = letters[0::2], letters[1::2]
    fields: dict[str, Any] = {
        "architectures": [kind.class_name],
        "model_type": kind.name,
        "num_hidden_layers": len(mixers),
        "rms_norm_eps": config.norm_epsilon,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "first_k_dense_replace": seconds.index("E") if "E" in seconds else len(seconds),
        # Both classes read it; kimi_linear never ties its head and has a copy.
        "tie_word_embeddings": config.tie_embeddings and kind.ties_head,
    }
    mla = latent_options(config)
    return fields | {
        "num_attention_heads": mla.num_heads,
        "num_key_value_heads": mla.num_heads,
        "kv_lora_rank": mla.latent_size,
        "q_lora_rank": mla.query_latent_size,
        "qk_nope_head_dim": mla.nope_head_dim,
        "qk_rope_head_dim": mla.rope_head_dim,
        "v_head_dim": mla.value_head_dim,
        "head_dim": mla.rope_head_dim,
    }


def expert_fields(config: ModelConfig, kind: LatentClass) -> dict[str, Any]:
    """Build the fields of feed-forward and experts, which stand last."""
    moe = config.moe
    fields: dict[str, Any] = {}
    if config.feed_forward is not None:
        fields["intermediate_size"] = config.feed_forward.hidden_size
    if moe is None:
        # A class without sparse layers still has sizes for them.
        return fields | {kind.experts: 2, kind.top_k: 1, kind.groups: 1, "topk_group": 1}
    fields.setdefault("intermediate_size", moe.expert_hidden_size)
    return fields | {
        kind.experts: moe.num_experts,
        kind.top_k: moe.top_k,
        kind.shared: max(1, moe.shared_expert_hidden_size // moe.expert_hidden_size),
        kind.groups: moe.num_router_groups,
        **({} if kind.normalize is None else {kind.normalize: moe.normalize_probabilities}),
        "topk_group": moe.router_group_top_k,
        "moe_intermediate_size": moe.expert_hidden_size,
        "routed_scaling_factor": moe.routed_scaling,
    }


def model_config_from_latent(
    fields: Mapping[str, Any], kind: LatentClass, types: Sequence[str], mixers: Mapping[str, Any]
) -> ModelConfig:
    """Build our configuration from config.json with the class's defaults filled in.

    types: of the layers' mixers. mixers: sections of those besides latent attention, and what that has besides sizes.
    Raises ValueError if the class uses something that our model does not have.
    """
    require_fields(fields, {"hidden_act": "silu", "attention_bias": False, "rope_interleave": True})
    if fields["num_key_value_heads"] != fields["num_attention_heads"]:
        raise ValueError(
            f"config.json: num_key_value_heads={fields['num_key_value_heads']} cannot be imported; latents are expanded to all "
            f"{fields['num_attention_heads']} heads"
        )
    layers = fields["num_hidden_layers"]
    dense = int(fields.get("first_k_dense_replace", 1))
    seconds = fields.get("mlp_layer_types") or ["dense" if layer < dense else "sparse" for layer in range(layers)]
    pattern = "".join(
        LETTERS[mixer] + ("E" if mlp == "sparse" else "-") for mixer, mlp in zip(types, seconds, strict=True)
    )
    sections = {name: section for name, section in mixers.items() if name != "mla"}
    if "+" in pattern:
        sections["mla"] = _mla_section(fields, kind) | mixers.get("mla", {})
    dense_size = fields["intermediate_size"]
    return ModelConfig.model_validate(
        {
            "pattern": pattern,
            **read_sizes(fields),
            "tie_embeddings": kind.ties_head and fields["tie_word_embeddings"],
            "mixers": sections,
            "moe": _moe(fields, kind) if "E" in pattern else None,
            "feed_forward": FeedForwardConfig(hidden_size=dense_size, activation="swiglu") if "-" in pattern else None,
        }
    )


def _mla_section(fields: Mapping[str, Any], kind: LatentClass) -> dict[str, Any]:
    return {
        "num_heads": fields["num_attention_heads"],
        "latent_size": fields["kv_lora_rank"],
        "query_latent_size": fields["q_lora_rank"],
        "nope_head_dim": fields["qk_nope_head_dim"],
        "rope_head_dim": fields["qk_rope_head_dim"],
        "value_head_dim": fields["v_head_dim"],
        "positions": kind.positions,
        "gate": kind.gate,
    }


def _moe(fields: Mapping[str, Any], kind: LatentClass) -> MoeConfig:
    width = fields["moe_intermediate_size"]
    return MoeConfig(
        num_experts=fields[kind.experts],
        top_k=fields[kind.top_k],
        expert_hidden_size=width,
        shared_expert_hidden_size=width * fields[kind.shared],
        activation="swiglu",
        router=kind.router,
        expert_bias=kind.router == "sigmoid",
        normalize_probabilities=kind.normalize is not None and fields[kind.normalize],
        routed_scaling=float(fields["routed_scaling_factor"]),
        num_router_groups=fields[kind.groups] or 1,
        router_group_top_k=fields["topk_group"] or 1,
        group_score_top_k=kind.group_score_top_k if (fields[kind.groups] or 1) > (fields["topk_group"] or 1) else 2,
    )


@dataclass(frozen=True)
class RotaryEntry(WeightEntry):
    """Rows in `heads` equal groups, the last `rotary` of each for channels that theirs pair with neighbours, ours by halves.

    is_first: the first ones of each, not the last.
    """

    heads: int = 1
    rotary: int = 0
    is_first: bool = False

    def pieces(self, shapes: Mapping[str, Shape]) -> Iterator[Piece]:
        """As in the base class, by whole heads."""
        shape = shapes[self.ours]
        each = shape[0] // self.heads
        for start, stop in cut_rows(shape[0], shape, multiple=each):
            part = replace(self, heads=(stop - start) // each)
            yield Piece(part, {self.ours: (start, stop)}, {self.theirs[0]: (start, stop)})

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """As in the base class."""
        plain, turned = self._parts(tensor)
        first, second = turned.chunk(2, dim=1)
        paired = torch.stack([first, second], dim=2).flatten(1, 2)
        return {self.theirs[0]: self._whole(plain, paired)}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As in the base class."""
        plain, turned = self._parts(tensors[self.theirs[0]])
        return self._whole(plain, torch.cat([turned[:, 0::2], turned[:, 1::2]], dim=1))

    def _parts(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        rows = tensor.unflatten(0, (self.heads, -1))
        sizes = [rows.shape[1] - self.rotary, self.rotary]
        first, second = rows.split(sizes[::-1] if self.is_first else sizes, dim=1)
        return (second, first) if self.is_first else (first, second)

    def _whole(self, plain: Tensor, turned: Tensor) -> Tensor:
        return torch.cat([turned, plain] if self.is_first else [plain, turned], dim=1).flatten(0, 1)


def latent_map(config: ModelConfig, kind: LatentClass, delta_entries: BlockEntries | None = None) -> WeightMap:
    """Build the weight map of a model that fits the class; `delta_entries`: of its Kimi Delta Attention, by our and their prefix."""
    aliases: dict[str, str] = {}

    def dense(config: ModelConfig, ours: str, layer: str) -> list[WeightEntry]:
        entries = list(_gated_entries(ours, f"{layer}mlp."))
        if kind.moe_place != "mlp":
            # transformers renames the mixtures of the release, and where it saves the dense layers with them.
            names = [name for entry in entries for name in entry.theirs]
            aliases.update({name.replace(".mlp.", f".{kind.moe_place}."): name for name in names})
        return entries

    def attending(build: BlockEntries) -> BlockEntries:
        return lambda config, ours, layer: build(config, ours, f"{layer}self_attn.")

    def experts(config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
        return _expert_entries(config, ours, f"{layer}{kind.moe_place}.", kind.expert_matrices)

    blocks = {"+": attending(partial(_latent_entries, is_rotary=kind.positions == "rope")), "-": dense, "E": experts}
    if delta_entries is not None:
        blocks["K"] = attending(delta_entries)
    zeros = {"E": lambda config, layer: _expert_zeros(config, kind, f"{layer}{kind.moe_place}.")}
    return replace(paired_map(config, blocks, zeros=zeros, copies_head=not kind.ties_head), aliases=aliases)


def _latent_entries(config: ModelConfig, ours: str, theirs: str, *, is_rotary: bool) -> Iterator[WeightEntry]:
    options = mla_options(config)
    rotary = options.rope_head_dim if is_rotary else 0
    yield _rows(f"{ours}kv_down.weight", f"{theirs}kv_a_proj_with_mqa.weight", 1, rotary)
    yield WeightEntry(f"{ours}kv_norm.weight", (f"{theirs}kv_a_layernorm.weight",))
    yield WeightEntry(f"{ours}kv_up.weight", (f"{theirs}kv_b_proj.weight",))
    has_latent = options.query_latent_size is not None
    if has_latent:
        yield WeightEntry(f"{ours}q_down.weight", (f"{theirs}q_a_proj.weight",))
        yield WeightEntry(f"{ours}q_norm.weight", (f"{theirs}q_a_layernorm.weight",))
    query = f"{theirs}{'q_b_proj' if has_latent else 'q_proj'}.weight"
    yield _rows(f"{ours}q_proj.weight", query, options.num_heads, rotary)
    if options.gate != "none":
        yield WeightEntry(f"{ours}g_proj.weight", (f"{theirs}g_proj.weight",))
    yield WeightEntry(f"{ours}out_proj.weight", (f"{theirs}o_proj.weight",))


def _rows(ours: str, theirs: str, heads: int, rotary: int) -> WeightEntry:
    return RotaryEntry(ours, (theirs,), heads=heads, rotary=rotary) if rotary else WeightEntry(ours, (theirs,))


def _gated_entries(ours: str, theirs: str) -> Iterator[WeightEntry]:
    yield GatedEntry(f"{ours}up_proj.weight", (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight"))
    yield WeightEntry(f"{ours}down_proj.weight", (f"{theirs}down_proj.weight",))


def _expert_entries(config: ModelConfig, ours: str, theirs: str, names: tuple[str, str, str]) -> Iterator[WeightEntry]:
    """Entries of a mixture; `names`: of an expert's gate, up and down matrices."""
    assert config.moe is not None, "the pattern has E, the configuration no moe section"
    yield WeightEntry(f"{ours}router.weight", (f"{theirs}gate.weight",))
    if config.moe.expert_bias:
        yield WeightEntry(f"{ours}expert_bias", (f"{theirs}gate.e_score_correction_bias",))
    yield from gated_experts(ours, theirs, config.moe.num_experts, names)
    if config.moe.shared_expert_hidden_size:
        yield from _gated_entries(f"{ours}shared.", f"{theirs}shared_experts.")


def _expert_zeros(config: ModelConfig, kind: LatentClass, theirs: str) -> Zeros:
    """What the classes always have: a sigmoid's routing bias, and a shared expert as wide as one routed expert."""
    moe, width = config.moe, config.hidden_size
    assert moe is not None, "the pattern has E, the configuration no moe section"
    zeros = Zeros()
    if not moe.expert_bias and kind.router == "sigmoid":
        zeros[f"{theirs}gate.e_score_correction_bias"] = (moe.num_experts,)
    if not moe.shared_expert_hidden_size:
        zeros |= {
            f"{theirs}shared_experts.{name}_proj.weight": (moe.expert_hidden_size, width) for name in ("gate", "up")
        }
        zeros[f"{theirs}shared_experts.down_proj.weight"] = (width, moe.expert_hidden_size)
    return zeros
