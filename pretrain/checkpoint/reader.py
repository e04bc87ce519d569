"""Reads parameters from the files of a checkpoint: any range of any shard, from whatever shards were saved.

A range is asked for in the layout of the reader: flat numbers `start` to `start + n` of its shard. If a shard with the same
placement was saved, these are flat ranges of it, copied straight (a resume with the same parallel axes, at any ZeRO stage).
Else whole rows of the wanted shard are assembled from all saved shards that overlap them, and the range is cut out. Only
the parts of files that are needed are read.

What is read is listed by the manifest, joined from the reports of all ranks on their way to rank 0 (ranks/tree.py), so that it
gets what the manifest says and not each rank's copy of it.
Rank 0 checks, before the commit, what no rank can see on its own: that what they wrote makes up every parameter. A gap
found here is a bug, so it is an assertion, and the checkpoint that would have had it is never committed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amfm.model.on_demand import BLOCK_NUMEL, Source
from amfm.pretrain.checkpoint.files import FileEntry
from amfm.pretrain.checkpoint.manifest_file import rank_file_name
from amfm.pretrain.checkpoint.placement import Placement, check_cover, find_blocks, place_whole, placement_from_json
from amfm.pretrain.engine.adamw import AVERAGE, moments_of
from amfm.pretrain.tensor_files import TensorFile

# A checkpoint has a file per rank, and a process may open a thousand.
MAX_OPEN_FILES = 64


def kinds_of(manifest: dict[str, Any], name: str) -> tuple[str, ...]:
    """Name what is saved of a parameter, all float32: master weights, moments of its group's optimizer, and their average."""
    entry = manifest["parameters"][name]
    return ("weight", *moments_of(entry["group"]), *((AVERAGE,) if entry.get("averaged") else ()))


@dataclass(frozen=True)
class SavedShard:
    """One saved shard of a parameter: where it is, and which flat range (start, numel) is in which file."""

    placement: Placement
    ranges: tuple[tuple[int, int, str], ...]


def read_shards(manifest: dict[str, Any], name: str) -> list[SavedShard]:
    """List the shards in which a parameter was saved."""
    shape = manifest["parameters"][name]["shape"]
    return [
        SavedShard(
            placement_from_json(shape, shard["where"]),
            tuple((start, numel, file_name) for start, numel, file_name in shard["ranges"]),
        )
        for shard in manifest["shards"][name]
    ]


class RangeReader:
    """Reader of the verified files of one checkpoint; looks into each file once, when it is needed.

    `rows_numel`: a shard that must be put together from others is read about this many numbers at a time.
    """

    def __init__(self, checkpoint_dir: Path, manifest: dict[str, Any], *, rows_numel: int = BLOCK_NUMEL) -> None:
        self.checkpoint_dir = checkpoint_dir
        self.manifest = manifest
        self.rows_numel = rows_numel
        self.known_files: dict[str, TensorFile] = {}
        self.open_names: set[str] = set()
        self.known_shards: dict[str, list[SavedShard]] = {}

    def shards(self, name: str) -> list[SavedShard]:
        """List the shards in which a parameter was saved, remembering the answer."""
        if name not in self.known_shards:
            self.known_shards[name] = read_shards(self.manifest, name)
        return self.known_shards[name]

    def file(self, name: str) -> TensorFile:
        """Look into one tensor file, once. Raises RuntimeError for a damaged one."""
        if name not in self.known_files:
            self.known_files[name] = TensorFile(self.checkpoint_dir / name, RuntimeError)
        self.open_names.add(name)
        if len(self.open_names) > MAX_OPEN_FILES:
            for other in self.open_names - {name}:
                self.known_files[other].close()
            self.open_names = {name}
        return self.known_files[name]

    def buffer(self, name: str) -> Tensor:
        """Read a buffer of the model, as it was saved."""
        file = self.file(self.manifest["buffers"][name]["file"])
        key = f"buffer/{name}"
        stored = file.tensors[key]
        return file.numbers(key, 0, stored.numel).view(stored.shape)

    def whole(self, kind: str, name: str) -> Tensor:
        """Read one whole float32 tensor."""
        placement = place_whole(self.manifest["parameters"][name]["shape"])
        flat = torch.empty(placement.numel, dtype=torch.float32)
        self.fill(flat, kind, name, placement, 0)
        return flat.view(placement.whole)

    def source(self, kind: str, name: str) -> Source:
        """A whole float32 tensor whose rows are read when someone asks for them."""
        placement = place_whole(self.manifest["parameters"][name]["shape"])
        row_numel = math.prod(placement.whole[1:])

        def read(start: int, stop: int) -> Tensor:
            if not placement.whole:
                return self.whole(kind, name)
            rows = torch.empty(stop - start, *placement.whole[1:])
            self.fill(rows.view(-1), kind, name, placement, start * row_numel)
            return rows

        return Source(placement.whole, torch.float32, read)

    def fill(self, flat: Tensor, kind: str, name: str, wanted: Placement, start: int) -> None:
        """Copy the range that begins at `start` of the wanted, flattened shard into a flat view of its length.

        Reads the rows that the range touches, a few at a time where it was cut otherwise when it was saved.
        """
        for shard in self.shards(name):
            if shard.placement == wanted:
                for offset, values in self.pieces(kind, name, shard, start, flat.numel()):
                    flat[offset : offset + values.numel()].copy_(values)
                return
        row_numel = math.prod(wanted.shape[1:])
        end_row = -(-(start + flat.numel()) // row_numel)
        rows_at_once = max(1, self.rows_numel // row_numel)
        for first_row in range(start // row_numel, end_row, rows_at_once):
            rows = self.rows(kind, name, wanted, first_row, min(end_row, first_row + rows_at_once))
            low = max(start, first_row * row_numel)
            high = min(start + flat.numel(), first_row * row_numel + rows.numel())
            flat[low - start : high - start].copy_(
                rows.view(-1)[low - first_row * row_numel : high - first_row * row_numel]
            )

    def rows(self, kind: str, name: str, wanted: Placement, first_row: int, end_row: int) -> Tensor:
        """Assemble some rows of the wanted shard from all saved ones that overlap them."""
        # Files with NaN are rejected, so a NaN that is left marks a number that no shard holds.
        rows = torch.full((end_row - first_row, *wanted.shape[1:]), math.nan)
        for shard in self.shards(name):
            saved_shape = shard.placement.shape
            row_numel = math.prod(saved_shape[1:])
            for shared, blocks in find_blocks(shard.placement, wanted, first_row, end_row):
                saved = torch.empty(shared.length * row_numel)
                for offset, values in self.pieces(kind, name, shard, shared.saved * row_numel, saved.numel()):
                    saved[offset : offset + values.numel()] = values
                saved = saved.view(shared.length, *saved_shape[1:])
                target = rows[shared.wanted - first_row : shared.wanted - first_row + shared.length]
                for block in blocks:
                    source_slices = [slice(run.saved, run.saved + run.length) for run in block]
                    target_slices = [slice(run.wanted, run.wanted + run.length) for run in block]
                    target[(slice(None), *target_slices)] = saved[(slice(None), *source_slices)]
        assert not bool(torch.isnan(rows).any()), f"{kind} of {name}: the checkpoint holds a part of it only"
        return rows

    def pieces(self, kind: str, name: str, shard: SavedShard, start: int, numel: int) -> Iterator[tuple[int, Tensor]]:
        """Read the saved pieces of one range of one saved shard: (offset inside the range, flat float32 values)."""
        found = 0
        for saved_start, saved_numel, file_name in shard.ranges:
            low, high = max(start, saved_start), min(start + numel, saved_start + saved_numel)
            if low < high:
                key = f"{kind}/{name}/{saved_start}"
                # In blocks: the ranges of a file may be as large as a model.
                for first in range(low, high, self.rows_numel):
                    last = min(high, first + self.rows_numel)
                    values = self.file(file_name).numbers(key, first - saved_start, last - saved_start)
                    yield first - start, values
                found += high - low
        assert found == numel, f"{kind} of {name}: {found} of {numel} values are in the checkpoint"


def check_tiling(name: str, shard: SavedShard) -> None:
    """Assert that the ranges of a shard, sorted, cover it exactly once."""
    end = 0
    for start, numel, _ in shard.ranges:
        assert start == end, f"parameter {name}: a range starts at {start}, the one before it ends at {end}"
        end += numel
    assert end == shard.placement.numel, f"parameter {name}: ranges cover {end} of {shard.placement.numel} values"


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
