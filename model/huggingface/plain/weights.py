"""Tensors of a class of `families.py`, exact both ways but for norms that are stored as an offset from 1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from amfm.model.config.key_mixer_options import WindowOptions
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.entries import WeightEntry, WeightMap, paired_map
from amfm.model.huggingface.gpt_oss import StackedEntry
from amfm.model.huggingface.granitemoehybrid import mamba_entries
from amfm.model.huggingface.plain.families import Experts, Family
from amfm.model.huggingface.qwen3_next_weights import GatedEntry, NormEntry, gated_experts
from amfm.model.shapes import block_shapes


def plain_map(family: Family, config: ModelConfig) -> WeightMap:
    """Build the weight map of a model that fits the class."""
    blocks = {
        "*": _attention_entries,
        "W": _window_entries,
        "M": mamba_entries,
        "-": lambda config, ours, layer: gated_entries(ours, layer + family.dense_place),
    }
    if family.experts is not None:
        blocks["E"] = partial(_expert_entries, family.experts)
    norm_entry = NormEntry if family.has_offset_norms else WeightEntry
    more = [] if family.out_norms is None else list(_out_norm_entries(family.out_norms, norm_entry, config))
    found = paired_map(config, blocks, norms=family.norms, final=family.final_norm, norm_entry=norm_entry, more=more)
    if not family.has_offset_norms:
        return found
    of_heads = (".mixer.q_norm.weight", ".mixer.k_norm.weight")
    entries = (
        NormEntry(entry.ours, entry.theirs) if entry.ours.endswith(of_heads) else entry for entry in found.entries
    )
    return replace(found, entries=tuple(entries))


def _out_norm_entries(
    names: tuple[str, str], norm_entry: type[WeightEntry], config: ModelConfig
) -> Iterator[WeightEntry]:
    """Norms after both blocks of each layer."""
    for index in range(len(config.letters)):
        theirs = f"model.layers.{index // 2}.{names[index % 2]}.weight"
        yield norm_entry(f"blocks.{index}.out_norm.weight", (theirs,))


def _attention_entries(config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
    """Attention has the classes' names."""
    for name in block_shapes(config, "*"):
        yield WeightEntry(ours + name, (f"{layer}self_attn.{name}",))


def _window_entries(config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
    options = config.block_options("W")
    assert isinstance(options, WindowOptions), f"W has {type(options).__name__}"
    heads, keys, size = options.num_heads, options.kv_heads(), options.head_dim
    for name in block_shapes(config, "W"):
        module, _, kind = name.partition(".")
        if module == "in_proj":
            names = tuple(f"{layer}self_attn.{part}_proj.{kind}" for part in "qkv")
            yield StackedEntry(ours + name, names, sizes=(heads * size, keys * size, keys * size))
        else:
            yield WeightEntry(ours + name, (f"{layer}self_attn.{name.replace('out_proj', 'o_proj')}",))


def gated_entries(ours: str, theirs: str) -> Iterator[WeightEntry]:
    """Entries of a gated feed-forward."""
    yield GatedEntry(f"{ours}up_proj.weight", (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight"))
    yield WeightEntry(f"{ours}down_proj.weight", (f"{theirs}down_proj.weight",))


def _expert_entries(experts: Experts, config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
    assert config.moe is not None, "the pattern has E, the configuration no moe section"
    theirs = layer + experts.place
    yield WeightEntry(f"{ours}router.weight", (theirs + experts.router,))
    if experts.bias is not None:
        yield WeightEntry(f"{ours}expert_bias", (theirs + experts.bias,))
    yield from gated_experts(ours, theirs, config.moe.num_experts, experts.matrices)
    if experts.shared is not None:
        yield from gated_entries(f"{ours}shared.", layer + experts.shared.place)
    if config.moe.shared_expert_gate:
        yield WeightEntry(f"{ours}shared_gate.weight", (f"{theirs}shared_expert_gate.weight",))
