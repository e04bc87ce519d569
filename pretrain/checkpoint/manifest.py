"""The manifest of a checkpoint, joined from the reports of all ranks.

Rank 0 alone joins, before the commit, and checks what no rank can see by itself: that ranks agree on what they share, and
that what they wrote makes up every parameter. A gap found here is a bug, so it is an assertion, and the checkpoint that
would have had it is never committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from amfm.pretrain.checkpoint.files import FileEntry, rank_file_name
from amfm.pretrain.checkpoint.placement import check_cover
from amfm.pretrain.checkpoint.reader import check_tiling, read_shards


@dataclass(frozen=True)
class RankReport:
    """Report of what one rank wrote: its parameters, shards, ranges (name, start, numel) and buffers, and the file.

    `groups`: settings of its parameter groups. `file` is None until it is written.
    """

    parameters: dict[str, dict[str, Any]]
    shards: dict[str, dict[str, Any]]
    ranges: list[tuple[str, int, int]]
    buffers: dict[str, dict[str, Any]]
    groups: dict[str, dict[str, Any]]
    file: FileEntry | None = None


def describe_tensor(shape: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """Describe shape and dtype as the manifest does."""
    return {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}


def complete_manifest(manifest: dict[str, Any], reports: Sequence[RankReport]) -> dict[str, Any]:
    """Join the reports into the manifest: parameters, shards, buffers, group settings, and files with digests.

    Asserts that ranks agree on what they share, that the ranges tile each shard, and the shards cover each parameter.
    """
    parameters: dict[str, dict[str, Any]] = {}
    shards: dict[str, dict[str, dict[str, Any]]] = {}
    buffers: dict[str, dict[str, Any]] = {}
    groups: dict[str, dict[str, Any]] = {}
    files = {}
    for rank, report in enumerate(reports):
        assert report.file is not None, f"rank {rank} reports before it wrote"
        file_name = rank_file_name(rank)
        files[file_name] = {"bytes": report.file.num_bytes, "sha256": report.file.sha256}
        merge(parameters, report.parameters, rank)
        merge(groups, report.groups, rank)
        buffers |= {name: {**entry, "file": file_name} for name, entry in report.buffers.items()}
        for name, start, numel in report.ranges:
            described = report.shards[name]
            # Equal shards have one entry, whoever wrote which range of it.
            known = shards.setdefault(name, {}).setdefault(str(described["where"]), {**described, "ranges": []})
            known["ranges"].append([start, numel, file_name])
    complete = {
        **manifest,
        "groups": groups,
        "parameters": parameters,
        "shards": {name: list(entries.values()) for name, entries in shards.items()},
        "buffers": buffers,
        "files": files,
    }
    for name, entries in complete["shards"].items():
        for entry in entries:
            entry["ranges"].sort()
        shards_of_name = read_shards(complete, name)
        for shard in shards_of_name:
            check_tiling(name, shard)
        check_cover(name, [shard.placement for shard in shards_of_name])
    return complete


def merge(known: dict[str, dict[str, Any]], given: dict[str, dict[str, Any]], rank: int) -> None:
    """Merge one rank's entries into those of the ranks before it, with which they must agree."""
    for name, entry in given.items():
        agreed = known.setdefault(name, entry)
        assert agreed == entry, f"rank {rank} describes {name} as {entry}, a rank before it as {agreed}"
