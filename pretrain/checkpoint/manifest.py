"""The manifest of a checkpoint, joined from the reports of all ranks.

Reports are joined on their way to rank 0 (ranks/tree.py), so that it gets what the manifest says and not each rank's copy of it.
Rank 0 checks, before the commit, what no rank can see on its own: that what they wrote makes up every parameter. A gap
found here is a bug, so it is an assertion, and the checkpoint that would have had it is never committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from amfm.pretrain.checkpoint.files import FileEntry
from amfm.pretrain.checkpoint.manifest_file import rank_file_name
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


@dataclass(frozen=True)
class JoinedReports:
    """The reports of several ranks in one, on their way to rank 0: what ranks say alike stands there once.

    shards: by name and place, each with the ranges (start, numel, rank) of all who wrote some. buffers: with the rank that
    wrote each. files: by rank.
    """

    parameters: dict[str, dict[str, Any]]
    shards: dict[tuple[str, str], dict[str, Any]]
    buffers: dict[str, tuple[int, dict[str, Any]]]
    groups: dict[str, dict[str, Any]]
    files: dict[int, FileEntry]

    @classmethod
    def of(cls, rank: int, report: RankReport) -> JoinedReports:
        """The report of one rank."""
        assert report.file is not None, f"rank {rank} reports before it wrote"
        shards = {
            (name, str(shard["where"])): {**shard, "first": rank, "ranges": []} for name, shard in report.shards.items()
        }
        for name, start, numel in report.ranges:
            shards[name, str(report.shards[name]["where"])]["ranges"].append((start, numel, rank))
        buffers = {name: (rank, entry) for name, entry in report.buffers.items()}
        return cls(dict(report.parameters), shards, buffers, dict(report.groups), {rank: report.file})

    def joined(self, other: JoinedReports) -> JoinedReports:
        """Add the reports of other ranks to these, which change. Asserts that they agree on what they share."""
        merge(self.parameters, other.parameters)
        merge(self.groups, other.groups)
        self.buffers.update(other.buffers)
        self.files.update(other.files)
        for key, shard in other.shards.items():
            known = self.shards.setdefault(key, shard)
            if known is not shard:
                known["ranges"] += shard["ranges"]
                if shard["first"] < known["first"]:  # equal shards are described by the lowest rank
                    known.update(first=shard["first"], coordinates=shard["coordinates"])
        return self


def complete_manifest(manifest: dict[str, Any], reports: JoinedReports) -> dict[str, Any]:
    """Complete the manifest with the reports of all ranks: parameters, shards, buffers, group settings, files with digests.

    Asserts that the ranges tile each shard, and the shards cover each parameter.
    """
    shards: dict[str, list[dict[str, Any]]] = {name: [] for name in reports.parameters}
    for (name, _), shard in sorted(reports.shards.items(), key=lambda entry: entry[1]["first"]):
        # Equal shards have one entry, whoever wrote which range of it.
        ranges = [[start, numel, rank_file_name(rank)] for start, numel, rank in sorted(shard["ranges"])]
        shards[name].append({"where": shard["where"], "coordinates": shard["coordinates"], "ranges": ranges})
    complete = {
        **manifest,
        "groups": reports.groups,
        "parameters": reports.parameters,
        "shards": shards,
        "buffers": {
            name: {**entry, "file": rank_file_name(rank)}
            for name, (rank, entry) in sorted(reports.buffers.items(), key=lambda entry: entry[1][0])
        },
        "files": {
            rank_file_name(rank): {"bytes": file.num_bytes, "sha256": file.sha256}
            for rank, file in sorted(reports.files.items())
        },
    }
    for name in shards:
        shards_of_name = read_shards(complete, name)
        for saved in shards_of_name:
            check_tiling(name, saved)
        check_cover(name, [saved.placement for saved in shards_of_name])
    return complete


def merge(known: dict[str, dict[str, Any]], given: dict[str, dict[str, Any]]) -> None:
    """Merge other ranks' entries into those that are known, with which they must agree."""
    for name, entry in given.items():
        agreed = known.setdefault(name, entry)
        assert agreed == entry, f"ranks describe {name} as {agreed} and as {entry}"
