"""Filling an engine from the ranges in a checkpoint, whatever layout wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from pretrain.checkpoint_commit import Agreement
from pretrain.checkpoint_duties import place_parameters
from pretrain.checkpoint_files import rank_file_name
from pretrain.checkpoint_fragments import (
    base_optimizer,
    collect_buffers,
    create_state,
    list_parts,
    name_groups,
    refresh_working_weights,
    restore_group_settings,
)
from pretrain.checkpoint_random import restore_random_state
from pretrain.checkpoint_ranges import KINDS, RangeReader
from pretrain.engine import ZeroEngine


def find_mismatches(manifest: dict[str, Any], engine: ZeroEngine, ranks: Agreement) -> list[str]:
    """Every parameter and buffer that is missing, surplus, of another shape or in another group; the same on all ranks.

    All ranks must call it: a pipeline stage has its own parameters only.
    """
    placements = place_parameters(engine)
    shapes = {name: list(placement.whole) for name, placement in placements.items()}
    saved_shapes = {name: entry["shape"] for name, entry in manifest["parameters"].items()}
    shapes |= {f"buffer {name}": list(tensor.shape) for name, tensor in collect_buffers(engine.module).items()}
    saved_shapes |= {f"buffer {name}": entry["shape"] for name, entry in manifest["buffers"].items()}
    faults = {f"{name} is in the model but not in the checkpoint" for name in shapes.keys() - saved_shapes.keys()}
    for name in shapes.keys() & saved_shapes.keys():
        if shapes[name] != saved_shapes[name]:
            faults.add(f"{name} has shape {shapes[name]}, in the checkpoint {saved_shapes[name]}")
    groups = name_groups(base_optimizer(engine.deepspeed))
    for part in list_parts(engine.deepspeed):
        for span in part.spans:
            saved_group = manifest["parameters"].get(span.name, {}).get("group", groups[part.group])
            if saved_group != groups[part.group]:
                faults.add(f"{span.name} is in group {groups[part.group]}, in the checkpoint in {saved_group}")
    known: set[str] = set()
    for own_names, own_faults in ranks.gather_everywhere((list(shapes), faults)):
        known |= set(own_names)
        faults |= own_faults
    faults |= {f"{name} is in the checkpoint but not in the model" for name in saved_shapes.keys() - known}
    return sorted(faults)


@torch.no_grad()
def restore(checkpoint_dir: Path, manifest: dict[str, Any], engine: ZeroEngine, rank: int) -> list[str]:
    """Fill masters, moments, counters, group settings, buffers and random state; return warnings.

    The files must have been verified and `find_mismatches` must have found nothing. All ranks must call it; each reads
    what its own ranges need.
    """
    reader = RangeReader(checkpoint_dir, manifest)
    placements = place_parameters(engine)
    for part in list_parts(engine.deepspeed):
        steps = {manifest["parameters"][span.name]["optimizer_step"] for span in part.spans}
        assert len(steps) <= 1, f"parameters stepped together were saved with different counters: {sorted(steps)}"
        flats = create_state(engine.deepspeed, part, steps.pop() if steps else 0)
        for span in part.spans:
            for kind in KINDS:
                place = flats[kind][span.flat_start : span.flat_start + span.numel]
                reader.fill(place, kind, span.name, placements[span.name], span.start)
    for name, buffer in collect_buffers(engine.module).items():
        buffer.copy_(reader.buffer(name))
    reader.close()
    restore_group_settings(engine.deepspeed, manifest["groups"])
    refresh_working_weights(engine.deepspeed)
    return restore_rank_random_state(checkpoint_dir, manifest, rank)


def restore_rank_random_state(checkpoint_dir: Path, manifest: dict[str, Any], rank: int) -> list[str]:
    """Each rank takes the generators of its number; one that did not exist keeps those that it was seeded with."""
    saved_world_size = manifest["layout"]["world_size"]
    if rank >= saved_world_size:
        return [f"rank {rank} did not exist among the {saved_world_size} that saved; it keeps its own random state"]
    with safe_open(checkpoint_dir / rank_file_name(rank), framework="pt") as file:
        keys = [key for key in file.keys() if key.startswith("random/")]  # noqa: SIM118 - not a dict
        restore_random_state({key.removeprefix("random/"): file.get_tensor(key) for key in keys})
    return []
