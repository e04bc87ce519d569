"""Reads checkpoints without DeepSpeed: whole weights for export and generation, inspection, comparison.

One process, no process group, no accelerator: whatever layout saved a checkpoint, a parameter is assembled from its shards
on the CPU. Callers verify first (`require_sound`). Tensors are read one parameter at a time, so that comparing two large
checkpoints needs little memory; `read_full_state` is the whole model as tensors that are read when they are asked for.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from amfm.data_pipeline.terminal import Report, silent
from amfm.model.on_demand import OnDemand, source_of
from amfm.pretrain.checkpoint.commit import is_marked
from amfm.pretrain.checkpoint.compatibility import compare_settings
from amfm.pretrain.checkpoint.files import find_foreign_files, verify_checkpoint
from amfm.pretrain.checkpoint.manifest_file import CHECKPOINT_NAME, MANIFEST_NAME, list_checkpoints
from amfm.pretrain.checkpoint.reader import RangeReader, kinds_of
from amfm.pretrain.engine.adamw import AVERAGE, OWNED

logger = logging.getLogger(__name__)


def find_checkpoint(path: Path, report: Report = silent) -> Path:
    """Find the checkpoint that a path means: itself, or the newest that verifies in a folder of them or a run directory.

    Newer ones that it passes over are named in a warning. Raises RuntimeError when there is none, naming each that failed
    with its reason.
    """
    if (path / MANIFEST_NAME).exists() or CHECKPOINT_NAME.fullmatch(path.name):
        return path
    checkpoints_dir = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    failed: list[str] = []
    for candidate in list_checkpoints(checkpoints_dir):
        _, problems = verify_checkpoint(candidate, report)
        if not problems:
            if failed:
                logger.warning("warning: taking %s, because newer ones are damaged: %s", candidate, " | ".join(failed))
            return candidate
        failed.append(f"{candidate.name}: {'; '.join(problems)}")
    if failed:
        raise RuntimeError(f"no checkpoint in {checkpoints_dir} verifies: " + " | ".join(failed))
    raise RuntimeError(f"{path} holds no checkpoint; give a step folder, a checkpoints folder or a run directory")


def require_sound(checkpoint_dir: Path, report: Report = silent) -> dict[str, Any]:
    """Verify a checkpoint and return its manifest; raises RuntimeError naming each problem."""
    manifest, problems = verify_checkpoint(checkpoint_dir, report)
    if manifest is None or problems:
        raise RuntimeError(f"checkpoint {checkpoint_dir} is damaged: " + "; ".join(problems))
    return manifest


def read_full_state(checkpoint_dir: Path, report: Report = silent, *, averaged: bool = False) -> OnDemand:
    """Give all weights and buffers in float32 on the CPU, by global name, each read from all shards when it is asked for.

    Verifies every digest first; RuntimeError when one fails. A tied head is absent, as in the model. Float buffers
    (the router's bias) come as float32, others keep their dtype. `model.load_state_dict` takes the result.
    averaged: the moving averages of weights in their place; ValueError if the run keeps none (section `ema`).
    """
    manifest = require_sound(checkpoint_dir, report)
    report(f"reading the weights of {checkpoint_dir.name}")
    reader = RangeReader(checkpoint_dir, manifest)
    kinds = {
        name: AVERAGE if averaged and AVERAGE in kinds_of(manifest, name) else "weight"
        for name in manifest["parameters"]
    }
    if averaged and AVERAGE not in kinds.values():
        raise ValueError(f"{checkpoint_dir} has no averaged weights; a run keeps them if it has a section `ema`")
    sources = {name: reader.source(kind, name) for name, kind in kinds.items()}
    for name in (name for name in manifest["buffers"] if not name.startswith(OWNED)):  # the model's, not an optimizer's
        buffer = reader.buffer(name)
        sources[name] = source_of(buffer.float() if buffer.is_floating_point() else buffer)
    return OnDemand(sources)


def read_parameters(checkpoint_dir: Path, manifest: dict[str, Any], kind: str) -> Iterator[tuple[str, Tensor]]:
    """Read whole float32 tensors of one kind (weight, or a moment), one parameter that has it after the other."""
    reader = RangeReader(checkpoint_dir, manifest)
    for name in manifest["parameters"]:
        if kind in kinds_of(manifest, name):
            yield name, reader.whole(kind, name)


def read_buffers(checkpoint_dir: Path, manifest: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Read the model's buffers in the dtype they were saved with."""
    reader = RangeReader(checkpoint_dir, manifest)
    for name in manifest["buffers"]:
        yield name, reader.buffer(name)


def inspect_checkpoint(checkpoint_dir: Path, report: Report = silent) -> dict[str, Any]:
    """Describe a folder and whether all of it verifies, as JSON can hold it; never raises for damage.

    Keys: kind, path, ok, problems, warnings; with a readable manifest also step, saved_at, marked, pattern, parameters
    (total, tensors, by_group), buffers, bytes, files, layout, identities, config_sha256, versions, state.
    """
    manifest, problems = verify_checkpoint(checkpoint_dir, report)
    found: dict[str, Any] = {
        "kind": "checkpoint",
        "path": str(checkpoint_dir),
        "ok": not problems,
        "problems": problems,
        "warnings": [],
    }
    if manifest is None:
        return found
    _, others = find_foreign_files(checkpoint_dir, manifest)
    by_group: dict[str, int] = {}
    for entry in manifest["parameters"].values():
        by_group[entry["group"]] = by_group.get(entry["group"], 0) + math.prod(entry["shape"])
    return {
        **found,
        "warnings": [f"{name} is not part of the checkpoint" for name in others],
        "step": manifest["step"],
        "saved_at": manifest["saved_at"],
        "marked": is_marked(checkpoint_dir),
        "pattern": manifest["config"]["model"]["pattern"],
        "parameters": {
            "total": sum(by_group.values()),
            "tensors": len(manifest["parameters"]),
            "by_group": by_group,
        },
        "buffers": len(manifest["buffers"]),
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "files": len(manifest["files"]),
        **{key: manifest[key] for key in ("layout", "identities", "config_sha256", "versions", "state")},
    }


def diff_checkpoints(first_dir: Path, second_dir: Path) -> dict[str, Any]:
    """Verify and compare two checkpoints as `compare_checkpoints` does; RuntimeError when one is damaged."""
    return compare_checkpoints((first_dir, second_dir), [require_sound(path) for path in (first_dir, second_dir)])


def compare_checkpoints(paths: tuple[Path, Path], manifests: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare two verified checkpoints, their numbers and their settings, as JSON can hold it.

    Keys: same (layouts aside), steps, only_in_first, only_in_second, tensors (name -> kind -> largest absolute
    difference, only differing ones); settings, identities, state, groups (of parameters: their settings) and layout:
    dotted name -> both values.
    """
    saved = [{**manifest["parameters"], **manifest["buffers"]} for manifest in manifests]
    shapes = [{name: entry["shape"] for name, entry in entries.items()} for entries in saved]
    common = {name for name in shapes[0].keys() & shapes[1].keys() if shapes[0][name] == shapes[1][name]}
    tensors: dict[str, dict[str, float]] = {}
    first, second = manifests
    kinds = dict.fromkeys(kind for name in first["parameters"] for kind in kinds_of(first, name))
    for kind in (*kinds, "buffer"):
        for name, difference in measure_differences(paths, manifests, kind, common):
            if difference > 0:
                tensors.setdefault(name, {})[kind] = difference
    counters = [{name: entry["optimizer_step"] for name, entry in m["parameters"].items()} for m in manifests]
    pairs = {
        "settings": compare_settings(first["config"], second["config"]),
        "identities": compare_settings(first["identities"], second["identities"]),
        "state": compare_settings(first["state"], second["state"]),
        "groups": compare_settings(first["groups"], second["groups"]),
        "optimizer_steps": compare_settings(*counters),
    }
    only_in_first, only_in_second = (sorted(shapes[index].keys() - common) for index in (0, 1))
    same = not (tensors or only_in_first or only_in_second or any(pairs.values()))
    pairs["layout"] = compare_settings(first["layout"], second["layout"])
    return {
        "same": same,
        "steps": [manifest["step"] for manifest in manifests],
        "only_in_first": only_in_first,
        "only_in_second": only_in_second,
        "tensors": tensors,
        **{key: {name: list(values) for name, values in pair.items()} for key, pair in pairs.items()},
    }


def measure_differences(
    paths: tuple[Path, Path], manifests: list[dict[str, Any]], kind: str, common: set[str]
) -> Iterator[tuple[str, float]]:
    """Measure the largest absolute difference of each tensor of one kind that both hold in the same shape."""
    first, second = paths
    if kind == "buffer":
        others = dict(read_buffers(second, manifests[1]))
        tensors = ((name, value, others.get(name)) for name, value in read_buffers(first, manifests[0]))
    else:
        reader = RangeReader(second, manifests[1])
        tensors = (
            (name, value, reader.whole(kind, name) if name in common else None)
            for name, value in read_parameters(first, manifests[0], kind)
            if name not in common or kind in kinds_of(manifests[1], name)
        )
    for name, value, other in tensors:
        if name in common and other is not None and value.numel() > 0:
            yield name, float((value.double() - other.double()).abs().max())
