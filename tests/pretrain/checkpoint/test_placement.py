"""Shards of any layout, written as its ranks would, give the shards of any other: only numbers, no process groups."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.shards import Shard, ShardSpec
from amfm.pretrain.checkpoint.files import write_tensors
from amfm.pretrain.checkpoint.placement import Placement, check_cover, join_indices, place_shard, placement_from_json
from amfm.pretrain.checkpoint.reader import JoinedReports, RangeReader, RankReport, complete_manifest, describe_tensor

KINDS = ("weight", "exp_avg", "exp_avg_sq")
# Odd sizes wherever no cut forbids it. `fused`: 4 query heads, 2 key-value heads and 1 group, which more ranks must copy.
SHAPES = {
    "norm": (7,),
    "scalar": (),
    "rows": (12, 5),
    "columns": (3, 8),
    "fused": (32, 3),
    "up": (4, 8, 3),
    "down": (4, 3, 4),
}
SHARDS = {
    "norm": Shard(partial=("tp",)),
    "scalar": Shard(),
    "rows": Shard((ShardSpec(0, "tp", (8, 4)),)),
    "columns": Shard((ShardSpec(1, "tp", (8,)),)),
    "fused": Shard((ShardSpec(0, "tp", (16, 10, 6), units=(4, 2, 1)),)),
    "up": Shard((ShardSpec(0, "ep", (4,)), ShardSpec(1, "expt_tp", (4, 4)))),
    "down": Shard((ShardSpec(0, "ep", (4,)), ShardSpec(2, "expt_tp", (4,)))),
}


@dataclass(frozen=True)
class Place:
    """One rank's place in a group."""

    number: int
    ranks: int

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.ranks


@dataclass(frozen=True)
class Layout:
    """Ranks on each axis; `spread`: into how many ranges ZeRO cuts each shard."""

    tp: int = 1
    ep: int = 1
    expt_tp: int = 1
    spread: int = 1

    def ranks(self) -> list[tuple[ProcessGroupCollection, int]]:
        """The groups of every rank, and the number of its range."""
        axes = {axis: getattr(self, axis) for axis in ("tp", "ep", "expt_tp")}
        places = itertools.product(*(range(size) for size in axes.values()), range(self.spread))
        return [
            (
                ProcessGroupCollection(**{axis: Place(at, axes[axis]) for axis, at in zip(axes, numbers)}),
                numbers[-1],
            )
            for numbers in places
        ]


LAYOUTS = [
    Layout(),
    Layout(spread=3),
    Layout(tp=2),
    Layout(tp=4, spread=2),
    Layout(ep=2, expt_tp=2),
    Layout(tp=2, ep=4, spread=5),
    Layout(tp=2, expt_tp=2, spread=2),
]


def whole_tensor(name: str, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(100 * KINDS.index(kind) + list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator)


def own_range(numel: int, number: int, spread: int) -> tuple[int, int]:
    return numel * number // spread, numel * (number + 1) // spread


def write_checkpoint(folder: Path, layout: Layout) -> dict[str, Any]:
    """Files and manifest as the ranks of a layout would leave them; the first of equal shards is written."""
    folder.mkdir()
    reports, written = [], set()
    for rank, (groups, number) in enumerate(layout.ranks()):
        tensors, ranges, shards = {}, [], {}
        for name, shard in SHARDS.items():
            part = shard.shard(whole_tensor(name, "weight"), groups)
            placement = place_shard(part.shape, shard, groups)
            low, high = own_range(part.numel(), number, layout.spread)
            if low == high or (name, placement, low) in written:
                continue
            written.add((name, placement, low))
            shards[name] = {"where": placement.to_json(), "coordinates": {}}
            ranges.append((name, low, high - low))
            for kind in KINDS:
                flat = shard.shard(whole_tensor(name, kind), groups).reshape(-1)
                tensors[f"{kind}/{name}/{low}"] = flat[low:high]
        parameters = {
            name: {**describe_tensor(SHAPES[name], torch.float32), "group": "decay", "optimizer_step": 3}
            for name in shards
        }
        entry = write_tensors(folder / f"rank-{rank:05d}.safetensors", tensors, {})
        reports.append(RankReport(parameters, shards, ranges, {}, {}, entry))
    joined = reduce(JoinedReports.joined, (JoinedReports.of(rank, report) for rank, report in enumerate(reports)))
    return complete_manifest({}, joined)


def check_every_range(reader: RangeReader, layout: Layout) -> None:
    for groups, number in layout.ranks():
        for (name, shard), kind in itertools.product(SHARDS.items(), KINDS):
            expected = shard.shard(whole_tensor(name, kind), groups)
            low, high = own_range(expected.numel(), number, layout.spread)
            flat = torch.full((high - low,), float("nan"))
            reader.fill(flat, kind, name, place_shard(expected.shape, shard, groups), low)
            assert torch.equal(flat, expected.reshape(-1)[low:high]), (name, kind)


# How much is read at once, and how many layouts read what each wrote: itself first, then those that follow it.
@pytest.mark.parametrize(
    ("rows_numel", "num_readers"),
    [
        (20, 2),
        (1 << 24, 1),
        pytest.param(20, len(LAYOUTS), marks=pytest.mark.slow),
        pytest.param(1, len(LAYOUTS), marks=pytest.mark.slow),
        pytest.param(1 << 24, len(LAYOUTS), marks=pytest.mark.slow),
    ],
)
def test_every_layout_reads_what_every_other_wrote(tmp_path: Path, rows_numel: int, num_readers: int) -> None:
    for number, saved in enumerate(LAYOUTS):
        folder = tmp_path / str(number)
        reader = RangeReader(folder, write_checkpoint(folder, saved), rows_numel=rows_numel)
        for following in range(num_readers):
            check_every_range(reader, LAYOUTS[(number + following) % len(LAYOUTS)])
        for name, kind in itertools.product(SHAPES, KINDS):
            assert torch.equal(reader.whole(kind, name), whole_tensor(name, kind))


def test_replicas_are_written_once(tmp_path: Path) -> None:
    manifest = write_checkpoint(tmp_path / "saved", Layout(tp=2, ep=2, spread=2))
    assert len(manifest["shards"]["norm"]) == 1 and len(manifest["shards"]["rows"]) == 2
    assert [entry["where"] for entry in manifest["shards"]["rows"]] == [
        {"0": [[0, 4], [8, 10]]},
        {"0": [[4, 8], [10, 12]]},
    ]
    assert len({file for entry in manifest["shards"]["up"] for _, _, file in entry["ranges"]}) == 4


def test_a_part_that_no_shard_holds_is_a_bug() -> None:
    left = Placement((4, 6), (((0, 2),), ((0, 6),)))
    with pytest.raises(AssertionError, match=r"the shards of parameter w \[4, 6\] do not cover it"):
        check_cover("w", [left])
    check_cover("w", [left, Placement((4, 6), (((1, 4),), ((0, 6),)))])


def test_a_missing_range_is_a_bug(tmp_path: Path) -> None:
    manifest = write_checkpoint(tmp_path / "saved", Layout(tp=2, spread=2))
    del manifest["shards"]["rows"][0]
    reader = RangeReader(tmp_path / "saved", manifest)
    with pytest.raises(AssertionError, match="weight of rows: the checkpoint holds a part of it only"):
        reader.whole("weight", "rows")


def test_placements_survive_json() -> None:
    placement = Placement((9, 4), (((0, 2), (5, 7)), ((0, 4),)))
    assert placement.to_json() == {"0": [[0, 2], [5, 7]]}
    assert placement_from_json((9, 4), placement.to_json()) == placement
    assert placement.shape == (4, 4)
    assert join_indices([3, 4, 9, 10, 11, 1]) == ((3, 5), (9, 12), (1, 2))


class CountingReader(RangeReader):
    """Counts the numbers that it takes from files."""

    taken = 0

    def pieces(self, *arguments: Any) -> Iterator[tuple[int, Tensor]]:
        for offset, values in super().pieces(*arguments):
            self.taken += values.numel()
            yield offset, values


def test_a_rank_reads_no_more_than_the_rows_that_it_needs(tmp_path: Path) -> None:
    reader = CountingReader(tmp_path / "saved", write_checkpoint(tmp_path / "saved", Layout(tp=2, ep=2, spread=3)))
    groups, _ = Layout(tp=4, ep=4).ranks()[1]
    for name, factor in (("norm", 1), ("rows", 1), ("columns", 2), ("up", 1)):
        part = SHARDS[name].shard(whole_tensor(name, "weight"), groups)
        low, high = part.numel() // 2, part.numel()
        reader.taken = 0
        reader.fill(torch.empty(high - low), "weight", name, place_shard(part.shape, SHARDS[name], groups), low)
        # Whole rows of what was saved: a row more at the edge, and twice the columns where those were cut in two.
        row = part.numel() // part.shape[0]
        assert reader.taken <= factor * (high - low + row), name
