"""Load the newest checkpoint that verifies, under the layout of this run.

The checkpoint may have been saved by another number of ranks, another ZeRO stage and other parallel axes. It stores each
parameter as shards that say which intervals of the whole parameter they hold (placement.py), so loading asks one question
per range of master weights and moments that this rank steps: which saved ranges overlap it? At last the model weights are derived
from the master weights, as after an optimizer step.

Each file is verified by one rank, which reads it once: the digest is computed while the numbers go to their places
(`Restore`). A checkpoint that turns out to be damaged has then been restored in part; the one before fills the same places,
all of them, before anything is computed with them.

Fill an engine from the files of a checkpoint, each of which is read once: hashed while its numbers go to their places.

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
from amfm.pretrain.checkpoint.commit import RankFailure, examine_latest
from amfm.pretrain.checkpoint.compatibility import check_resumable, describe_raised_rate, understand_config
from amfm.pretrain.checkpoint.engine_layout import EngineLayout
from amfm.pretrain.checkpoint.files import file_names_by_rank, find_foreign_files, restore_random_state, verify_file
from amfm.pretrain.checkpoint.fragments import create_state, refresh_working_weights, restore_group_settings
from amfm.pretrain.checkpoint.manifest_file import StorageError, list_checkpoints, read_manifest
from amfm.pretrain.checkpoint.reader import RangeReader, kinds_of
from amfm.pretrain.checkpoint.save import ENGINE_COUNTERS, ranks_of
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.engine.adamw import AVERAGE, FROZEN
from amfm.pretrain.launcher_protocol import find_saved
from amfm.pretrain.packages import collect_versions
from amfm.pretrain.ranks.group import RankGroup
from amfm.pretrain.tensor_files import open_tensors

GUIDE = ".guide_weight"  # end of the names of parameters that a run leaves behind


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint that was loaded: its step, the loop's own state, and what deserves a line in the event log.

    `skipped`: newer checkpoints that were passed over, each with its reason. `warnings`: oddities that did no harm.
    `changes`: settings that differ from the saved run and may. `fetched`: the checkpoint that this start took from a store.
    """

    step: int
    state: dict[str, Any]
    path: Path
    skipped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    fetched: str | None = None


def load_newest(
    checkpoints_dir: Path,
    layout: EngineLayout,
    *,
    config: RunConfig,
    identities: dict[str, str],
    report: Report = silent,
) -> LoadedCheckpoint | None:
    """Load the newest checkpoint that verifies into the engine; None when there is none at all.

    All ranks must call it; each reads and verifies a share of the files. A broken checkpoint is passed over for the one before.
    Raises RuntimeError when checkpoints exist but none verifies, naming each with its reason, and when there is none but
    there was (`refuse_lost`): training would otherwise restart without a word. Raises ValueError when the newest sound
    one belongs to another model, dataset or schedule. The layout may be another than the one that saved: each rank
    reads what its shards and ranges need.
    """
    engine = layout.engine
    ranks = ranks_of(engine)
    names = ranks.broadcast([path.name for path in list_checkpoints(checkpoints_dir)] if ranks.rank == 0 else None)
    skipped: list[str] = []
    for path in [checkpoints_dir / name for name in names]:
        manifest, problems = read_together(path, ranks)
        if manifest is None or problems:
            skipped.append(f"{path.name}: {'; '.join(problems)}")
            continue
        # A rejection here is an error and no reason to try an older checkpoint, which belongs to the same other run.
        changes = check_resumable(manifest, config, identities)
        mismatches = find_mismatches(
            manifest, layout, ranks, may_lack_guides=config.model.self_guided_training is not None
        )
        if mismatches:
            raise RuntimeError(f"checkpoint {path} does not fit this model: " + "; ".join(mismatches))
        restored = Restore(path, manifest, layout, ranks)
        problems = restored.read_own_files(report)
        if problems:
            skipped.append(f"{path.name}: {'; '.join(problems)}")
            continue
        warnings = ranks.broadcast(list_warnings(checkpoints_dir, path, manifest, config) if ranks.rank == 0 else None)
        own_warnings = restored.finish(report)
        warnings += [text for share in ranks.collect(own_warnings or None).values() for text in share]
        # DeepSpeed counts steps itself; its counters continue from the saved ones.
        for name in ENGINE_COUNTERS:
            setattr(engine.deepspeed, name, manifest["engine"][name])
        state = manifest["state"]
        return LoadedCheckpoint(manifest["step"], state, path, tuple(skipped), tuple(warnings), changes)
    if skipped:
        raise RuntimeError(
            f"none of the {len(skipped)} checkpoints in {checkpoints_dir} is whole: "
            + " | ".join(skipped)
            + ". Put back a copy of one of them, or give another run.dir to start over from step 0."
        )
    refuse_lost(checkpoints_dir, ranks)
    return None


def refuse_lost(checkpoints_dir: Path, ranks: RankGroup) -> None:
    """Raise RuntimeError on all ranks where there is no checkpoint, and the run's events say that there was one.

    A disk that is not mounted, a moved link or storage that shows files late would else begin the run again, silently,
    and drop the metrics of all that it had done. All ranks must call it.
    """
    saved = max(find_saved(checkpoints_dir.parent), default=None) if ranks.rank == 0 else None
    step = ranks.broadcast(saved)
    if step is not None:
        raise RuntimeError(
            f"{checkpoints_dir} holds no checkpoint, and by {checkpoints_dir.parent / 'events.jsonl'} the run saved one of "
            f"step {step}. Put it back (is its disk mounted?), or give another run.dir to start over from step 0."
        )


def read_together(checkpoint_dir: Path, ranks: RankGroup) -> tuple[dict[str, Any] | None, list[str]]:
    """Read the manifest of a checkpoint on rank 0 and broadcast it; the same answer everywhere.

    Returns the manifest, None when it is broken, and all problems. Raises StorageError on all ranks if the storage does
    not answer, which is not damage: to pass over the checkpoint would write another in its place. All ranks must call
    it.
    """
    manifest: dict[str, Any] | None = None
    problem, refused = RankFailure(), RankFailure()
    foreign: list[str] = []
    if ranks.rank == 0:
        with problem.caught():
            try:
                manifest = read_manifest(checkpoint_dir)
                foreign, _ = find_foreign_files(checkpoint_dir, manifest)
            except StorageError as error:
                refused.text = str(error)
    manifest, foreign, text, storage = ranks.broadcast((manifest, foreign, problem.text, refused.text))
    if storage is not None:
        raise StorageError(storage)
    if manifest is None:
        return None, [str(text)]
    return manifest, [f"{checkpoint_dir / name}: is not in the manifest" for name in foreign]


def list_warnings(checkpoints_dir: Path, chosen: Path, manifest: dict[str, Any], config: RunConfig) -> list[str]:
    """List oddities around a sound checkpoint: a wrong `latest`, foreign files, other libraries, a rate that rises again."""
    warnings = []
    older = list_checkpoints(checkpoints_dir)
    raised = describe_raised_rate(understand_config(manifest), config, int(manifest["step"]), older)
    if raised is not None:
        warnings.append(raised)
    about_latest = examine_latest(checkpoints_dir, chosen)
    if about_latest is not None:
        warnings.append(about_latest)
    _, others = find_foreign_files(chosen, manifest)
    warnings += [f"{chosen / name} is not part of the checkpoint; ignored" for name in others]
    now = collect_versions()
    for library, version in manifest["versions"].items():
        if now.get(library) != version:
            warnings.append(f"saved with {library} {version}, this is {now.get(library)}: results may differ in bits")
    return warnings


def find_mismatches(
    manifest: dict[str, Any], layout: EngineLayout, ranks: RankGroup, *, may_lack_guides: bool = False
) -> list[str]:
    """List parameters and buffers that are missing, surplus, of another shape or in another group; the same on all ranks.

    `may_lack_guides`: guides of factored matrices vanish in the middle of a run, and only they. All ranks must call it: a
    pipeline stage has its own parameters only.
    """
    shapes = {name: list(placement.whole) for name, placement in layout.placements.items()}
    saved_shapes = {name: entry["shape"] for name, entry in manifest["parameters"].items()}
    shapes |= {f"buffer {name}": list(tensor.shape) for name, tensor in layout.buffers().items()}
    saved_shapes |= {f"buffer {name}": entry["shape"] for name, entry in manifest["buffers"].items()}
    faults = {f"{name} is in the model but not in the checkpoint" for name in shapes.keys() - saved_shapes.keys()}
    for name in shapes.keys() & saved_shapes.keys():
        if shapes[name] != saved_shapes[name]:
            faults.add(f"{name} has shape {shapes[name]}, in the checkpoint {saved_shapes[name]}")
    for part in layout.parts:
        label = layout.group_labels[part.group]
        for span in part.spans:
            saved_group = manifest["parameters"].get(span.name, {}).get("group", label)
            if saved_group != label:
                faults.add(f"{span.name} is in group {label}, in the checkpoint in {saved_group}")
    for name in layout.frozen:
        saved_group = manifest["parameters"].get(name, {}).get("group", FROZEN)
        if saved_group != FROZEN:
            faults.add(f"{name} is frozen, in the checkpoint in group {saved_group}")
    # Surplus in the checkpoint shows only against the names of all ranks together.
    known, faults = ranks.merge((set(shapes), faults), lambda one, other: (one[0] | other[0], one[1] | other[1]))
    surplus = saved_shapes.keys() - known
    if may_lack_guides:
        surplus = {name for name in surplus if not name.endswith(GUIDE)}
    faults |= {f"{name} is in the checkpoint but not in the model" for name in surplus}
    return sorted(faults)


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
