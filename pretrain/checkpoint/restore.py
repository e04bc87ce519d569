"""Fill an engine from the files of a checkpoint, each of which is read once: hashed while its numbers go to their places.

Every rank verifies a share of the files, those that are where its own file would: with as many ranks as saved, its own, with
half as many, two next to each other. What it needs from these it takes while they pass. Needs in other files, and
shards that were cut otherwise when they were saved, are read by ranges afterwards, when every file is known to be
sound.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amfm.data_pipeline.terminal import Report, silent
from amfm.pretrain.checkpoint.commit import RankFailure
from amfm.pretrain.checkpoint.engine_layout import EngineLayout
from amfm.pretrain.checkpoint.files import file_names_by_rank, verify_file
from amfm.pretrain.checkpoint.fragments import create_state, refresh_working_weights, restore_group_settings
from amfm.pretrain.checkpoint.manifest_file import StorageError
from amfm.pretrain.checkpoint.random_state import restore_random_state
from amfm.pretrain.checkpoint.reader import RangeReader, kinds_of
from amfm.pretrain.engine.moments import AVERAGE
from amfm.pretrain.ranks.group import RankGroup
from amfm.pretrain.tensor_files import open_tensors


def has_average(manifest: dict[str, Any], name: str) -> bool:
    """Whether a checkpoint has the moving average of a parameter."""
    return AVERAGE in kinds_of(manifest, name)


@dataclass(frozen=True)
class Passing:
    """Numbers `first` to `last` of a stored tensor that this rank takes while the file passes, and where they go."""

    first: int
    last: int
    place: Tensor

    def take(self, start: int, numbers: Tensor) -> None:
        """Copy what of a block that begins at `start` belongs here."""
        low, high = max(start, self.first), min(start + numbers.numel(), self.last)
        if low < high:
            self.place[low - self.first : high - self.first].copy_(numbers[low - start : high - start])


class Restore:
    """One checkpoint on its way into an engine. All ranks make one and call `read_own_files`, then `finish`.

    The manifest must be sound, and fit the model (`find_mismatches`).
    """

    def __init__(self, checkpoint_dir: Path, manifest: dict[str, Any], layout: EngineLayout, ranks: RankGroup) -> None:
        self.checkpoint_dir, self.manifest, self.layout, self.ranks = checkpoint_dir, manifest, layout, ranks
        self.reader = RangeReader(checkpoint_dir, manifest)
        names = list(manifest["files"])
        self.own_files = [
            name for place, name in enumerate(names) if place * ranks.world_size // len(names) == ranks.rank
        ]
        self.passing: dict[tuple[str, str], list[Passing]] = defaultdict(list)

    @torch.no_grad()
    def read_own_files(self, report: Report = silent) -> list[str]:
        """Verify this rank's share of the files, restoring what passes; returns what is wrong with any, on all ranks alike.

        Raises StorageError on all ranks if the storage does not answer any of them.
        """
        self.later = [need for need in self._list_needs() if not self._passes(*need)]
        problems, refused = [], RankFailure()
        files = {name: self.manifest["files"][name] for name in self.own_files}
        done, total = 0, sum(entry["bytes"] for entry in files.values())
        for name, entry in files.items():

            def take(key: str, start: int, numbers: Tensor, name: str = name) -> None:
                for passing in self.passing[name, key]:
                    passing.take(start, numbers)

            with refused.caught():
                problem = verify_file(self.checkpoint_dir, name, entry, report, done, total, take)
                if problem is not None:
                    problems.append(problem)
            done += entry["bytes"]
        refusals = self.ranks.collect(refused.text)
        if refusals:
            raise StorageError(next(iter(refusals.values())))
        return [text for share in self.ranks.collect(problems or None).values() for text in share]

    @torch.no_grad()
    def finish(self, report: Report = silent) -> list[str]:
        """Fill what has not passed: numbers in others' files, frozen weights, buffers, settings, counters, random state.

        All files must be sound. Returns warnings of this rank. All ranks must call it.
        """
        report(f"loading {self.checkpoint_dir.name}")
        layout, engine = self.layout, self.layout.engine.deepspeed
        for place, kind, name, start in self.later:
            self.reader.fill(place, kind, name, layout.placements[name], start)
        for name, buffer in layout.buffers().items():
            buffer.copy_(self.reader.buffer(name))
        restore_group_settings(engine, self.manifest["groups"])
        for number, average in layout.averages.items():
            if not all(has_average(self.manifest, span.name) for span in layout.parts[number].spans):
                average.copy_(layout.parts[number].master.detach().reshape(-1))  # the average begins here
        refresh_working_weights(layout.engine)
        return self._restore_random_state()

    def _list_needs(self) -> list[tuple[Tensor, str, str, int]]:
        """What this rank holds: a flat view to fill, what of the parameter it is, its name, and where in the shard it starts.

        Makes the optimizer's state, at the saved step.
        """
        layout, needs = self.layout, []
        for number, part in enumerate(layout.parts):
            steps = {self.manifest["parameters"][span.name]["optimizer_step"] for span in part.spans}
            assert len(steps) <= 1, f"parameters stepped together were saved with different counters: {sorted(steps)}"
            flats = create_state(layout.engine.deepspeed, part, steps.pop() if steps else 0)
            if number in layout.averages and all(has_average(self.manifest, span.name) for span in part.spans):
                flats[AVERAGE] = layout.averages[number]
            needs += [
                (flat[span.flat_start : span.flat_start + span.numel], kind, span.name, span.start)
                for span in part.spans
                for kind, flat in flats.items()
            ]
        return needs + [
            (fragment.tensors["weight"], "weight", fragment.name, 0) for fragment in layout.frozen_fragments()
        ]

    def _passes(self, place: Tensor, kind: str, name: str, start: int) -> bool:
        """Whether all of a need passes in the files of this rank, in a shard that was saved as it is; noted there then."""
        wanted = self.layout.placements[name]
        shard = next((shard for shard in self.reader.shards(name) if shard.placement == wanted), None)
        if shard is None:
            return False
        parts = [
            (file, saved, max(start, saved), min(start + place.numel(), saved + numel))
            for saved, numel, file in shard.ranges
            if max(start, saved) < min(start + place.numel(), saved + numel)
        ]
        if not all(file in self.own_files for file, *_ in parts):
            return False
        found = sum(high - low for *_, low, high in parts)
        assert found == place.numel(), f"{kind} of {name}: {found} of {place.numel()} values are in the checkpoint"
        for file, saved, low, high in parts:
            key = f"{kind}/{name}/{saved}"
            self.passing[file, key].append(Passing(low - saved, high - saved, place[low - start : high - start]))
        return True

    def _restore_random_state(self) -> list[str]:
        """Restore the random generators of this rank; a rank that did not exist keeps those it was seeded with.

        Returns warnings.
        """
        rank, saved_world_size = self.ranks.rank, self.manifest["layout"]["world_size"]
        if rank >= saved_world_size:
            # One of them speaks for all: there may be thousands.
            new = f"ranks {rank} to {self.ranks.world_size - 1}" if rank < self.ranks.world_size - 1 else f"rank {rank}"
            text = f"{new} did not exist among the {saved_world_size} that saved; own random state is kept"
            return [text] if rank == saved_world_size else []
        with open_tensors(self.checkpoint_dir / file_names_by_rank(self.manifest)[rank], RuntimeError) as file:
            keys = [key for key in file.keys() if key.startswith("random/")]  # noqa: SIM118 - not a dict
            restore_random_state({key.removeprefix("random/"): file.get_tensor(key) for key in keys})
        return []
