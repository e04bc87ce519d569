"""Copies of checkpoints in an object store: `train.checkpoint_store`, for machines whose disks end with them.

A checkpoint is first committed in the run directory (save.py). Then, still during training, every rank sends a share of
its files, large ones in parts; when all stand in the store with their sizes, rank 0 sends the manifest. **That object
is the commit**: a step without it is not a checkpoint, whatever was sent. A step that is sent again loses its manifest
first. Only then are older steps removed, manifest first.

A start takes from the store what the run directory does not have: the newest step beyond its own, fetched by all ranks
into a temporary folder, with every digest compared on the way, and renamed into place. From there it is loaded like any
other (load.py). A damaged step is passed over for the one before, and a store that does not answer ends the start: older
numbers must not be trained on because of a network. A step that was saved here and is gone from here was taken away by
someone, and is not brought back unasked.

A copy that cannot be sent is a warning, because the checkpoint of the run directory stands; the next save sends the next one.
The last one of a run has no next: it is tried once more, and a start sends what the store lacks of the checkpoint that it
continues from.

Checkpoints that come from elsewhere, a store or the memory of nodes: copies checked against their digests, and the
rename at the end.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from amfm.data_pipeline.durable.files import make_folders, named, sync, try_to_delete
from amfm.data_pipeline.store.object_store import RemoteFolder
from amfm.pretrain.checkpoint.commit import (
    LATEST_NAME,
    TEMPORARY_NAME,
    RankFailure,
    is_marked,
    make_temporary,
    mark,
    remove_temporary,
)
from amfm.pretrain.checkpoint.files import make_place, replace_text, sync_folders
from amfm.pretrain.checkpoint.manifest_file import EVERY, MANIFEST_NAME, MARK_NAME, list_checkpoints, read_manifest
from amfm.pretrain.launcher_protocol import find_rollback, find_saved
from amfm.pretrain.ranks.group import RankGroup

FETCH_BYTES = 1 << 24


class Source(Protocol):
    """What can be read in blocks; the end is an empty one."""

    def read(self, size: int, /) -> bytes:
        """Read at most this many bytes."""
        ...


def copy_verified(source: Source, path: Path, name: str, entry: Mapping[str, Any]) -> str | None:
    """Copy a file durably, hashing it on the way; returns what is damaged, and then leaves no copy, or None."""
    digest, size = hashlib.sha256(), 0
    with named(path), path.open("xb") as file:
        while block := source.read(FETCH_BYTES):
            digest.update(block)
            file.write(block)
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    if (size, digest.hexdigest()) == (entry["bytes"], entry["sha256"]):
        return None
    path.unlink()
    return f"{name}: {size} bytes with SHA-256 {digest.hexdigest()}, the manifest states {entry['bytes']} and {entry['sha256']}"


def commit_fetched(
    temporary_dir: Path, name: str, damages: list[str], problem: RankFailure, ranks: RankGroup, doing: str
) -> str | None:
    """Rename what all ranks have copied to the checkpoint `name`, or remove it where something is damaged or failed.

    All ranks must call it. Returns the damages of all ranks, None for none; raises RuntimeError on all where one failed.
    """
    told = ranks.all_gather((problem.text, damages))
    failed = any(text is not None for text, _ in told)
    damages = [text for _, texts in told for text in texts]
    if ranks.rank == 0:
        if failed or damages:
            try_to_delete(temporary_dir, TEMPORARY_NAME)
        else:
            with problem.caught():
                sync_folders(temporary_dir)
                os.rename(temporary_dir, temporary_dir.with_name(name))
                sync(temporary_dir.parent)
                replace_text(temporary_dir.with_name(LATEST_NAME), name + "\n")
    ranks.raise_together(problem.text, doing)
    return "; ".join(damages) or None


# What we write below the URL; nothing else there is looked at or removed.
OBJECT_NAME = re.compile(r"(step-\d{8,})/(manifest\.json|keep|(?:ranks-\d{5}/)?rank-\d{5}\.safetensors)")


@dataclass(frozen=True)
class SentCopy:
    """A copy of an earlier checkpoint that was sent later, and warnings on what went wrong (on all ranks)."""

    step: int
    remarks: tuple[str, ...]
    event: ClassVar[str] = "copied"

    def facts(self) -> dict[str, Any]:
        """What its event says."""
        return {"problem": self.remarks[0] if self.remarks else None}

    def warnings(self) -> tuple[str, ...]:
        """What the user is told."""
        return self.remarks


class Pulled(NamedTuple):
    """The step that was fetched from a store, if any, and newer ones that are damaged there."""

    name: str | None = None
    passed_over: tuple[str, ...] = ()


class RemoteCheckpoints:
    """The checkpoints of one run at a URL. Every rank makes one; the methods say who calls them."""

    def __init__(self, url: str) -> None:
        """ValueError for a URL of an unknown kind; nothing is asked of the network yet."""
        self.folder = RemoteFolder(url)

    def list_objects(self, within: str = "") -> dict[str, list[str]]:
        """List the objects of every step by its name, newest first. One rank calls it; RuntimeError as `RemoteFolder`.

        within: a folder below the URL, such as that of a rollback.
        """
        steps: dict[str, list[str]] = {}
        prefix = f"{within}/" if within else ""
        for facts in self.folder.list():
            match = OBJECT_NAME.fullmatch(facts.name.removeprefix(prefix))
            if match is not None and facts.name.startswith(prefix):
                steps.setdefault(match[1], []).append(match[2])
        return dict(sorted(steps.items(), key=lambda entry: step_named(entry[0]), reverse=True))

    def list_whole(self, within: str = "") -> dict[str, list[str]]:
        """List the steps that are checkpoints, as `list_objects` does."""
        return {name: objects for name, objects in self.list_objects(within).items() if MANIFEST_NAME in objects}

    def rename(self, name: str, target: str, objects: Sequence[str]) -> None:
        """Give a step another place below the URL; killed anywhere, one of both is whole. One rank calls it.

        Stores cannot rename: copied, the manifest last, then removed, the manifest first.
        """
        ordered = sorted(objects, key=lambda file: file == MANIFEST_NAME)
        for file in ordered:
            self.folder.copy(f"{name}/{file}", f"{target}/{file}")
        self.folder.delete([f"{name}/{file}" for file in reversed(ordered)])

    def lacks(self, name: str, ranks: RankGroup) -> bool:
        """Whether the store has no whole copy of a step, or does not answer. All ranks must call it."""
        found = False
        if ranks.rank == 0:
            with RankFailure().caught():
                found = MANIFEST_NAME in self.list_objects().get(name, [])
        return not ranks.broadcast(found)

    def push(self, checkpoint_dir: Path, ranks: RankGroup, keep_last: int) -> list[str]:
        """Copy a committed checkpoint and prune the store to `keep_last`; returns warnings. All ranks must call it."""
        problem, name = RankFailure(), checkpoint_dir.name
        files: list[str] = []
        if ranks.rank == 0:
            with problem.caught():
                files = sorted(read_manifest(checkpoint_dir)["files"])
                self._set_aside(name, (checkpoint_dir / MANIFEST_NAME).read_bytes())
                self.folder.delete([f"{name}/{MANIFEST_NAME}"])
        files = ranks.broadcast(files)
        with problem.caught():
            for file in files[ranks.rank :: ranks.world_size]:
                self.folder.write_file(f"{name}/{file}", checkpoint_dir / file)
        told = ranks.all_gather(problem.text)
        if ranks.rank == 0 and not any(told):
            with problem.caught():
                if is_marked(checkpoint_dir):
                    self.folder.write(f"{name}/{MARK_NAME}", (checkpoint_dir / MARK_NAME).read_bytes())
                self.folder.write(f"{name}/{MANIFEST_NAME}", (checkpoint_dir / MANIFEST_NAME).read_bytes())
                self._prune(
                    name, keep_last, {path.name for path in list_checkpoints(checkpoint_dir.parent) if is_marked(path)}
                )
            told = [problem.text]
        texts = [text for text in ranks.broadcast(told) if text is not None]
        return [f"{name} was not copied to {self.folder.url}: {texts[0]}"] if texts else []

    def _set_aside(self, name: str, manifest: bytes) -> None:
        """Give a copy that someone marked another place, where one of other content is to take its own."""
        objects = self.list_whole().get(name, [])
        if (
            MARK_NAME not in objects
            or self.folder.read(f"{name}/{MARK_NAME}") == EVERY
            or self.folder.read(f"{name}/{MANIFEST_NAME}") == manifest
        ):
            return
        places = (f"replaced-{number}" for number in count(1))
        self.rename(name, f"{next(place for place in places if not self.list_objects(place))}/{name}", objects)

    def release(self, name: str) -> None:
        """Remove the mark of a step's copy, so that pruning may remove it."""
        self.folder.delete([f"{name}/{MARK_NAME}"])

    def _prune(self, name: str, keep_last: int, marked: set[str]) -> None:
        """Remove the copies of old steps, and what was sent of steps without a manifest; those marked here or there stay."""
        kept = 0
        for step, objects in self.list_objects().items():
            is_whole = MANIFEST_NAME in objects
            if step_named(step) > step_named(name) or MARK_NAME in objects or step in marked:
                continue  # a run that fell back sends later steps again
            kept += is_whole
            if is_whole and kept <= keep_last:
                continue
            first = [MANIFEST_NAME] if is_whole else []
            self.folder.delete([f"{step}/{file}" for file in first])
            self.folder.delete([f"{step}/{file}" for file in objects if file not in first])

    def pull_newer(self, checkpoints_dir: Path, ranks: RankGroup) -> Pulled:
        """Fetch the newest sound step beyond those of a folder, if the store has one.

        All ranks must call it. Raises RuntimeError on all ranks when the store does not answer, or when it has steps and
        neither it nor the folder has a sound one; ValueError when someone took the newest one out of the folder.
        """
        problem, doing = RankFailure(), f"checkpoints of {self.folder.url} were not fetched"
        newer: dict[str, list[str]] = {}
        newest = -1
        taken: str | None = None
        if ranks.rank == 0:
            with problem.caught():
                local = [step_named(path.name.removesuffix(".old")) for path in list_checkpoints(checkpoints_dir)]
                newest = max(local, default=-1)
                newer = {name: objects for name, objects in self.list_whole().items() if step_named(name) > newest}
                taken = self._explain_taken(newer, checkpoints_dir, newest)
        ranks.raise_together(problem.text, doing)
        newer, newest, taken = ranks.broadcast((newer, newest, taken))
        if taken is not None:
            raise ValueError(taken)
        skipped: list[str] = []
        for name, objects in newer.items():
            damage = self._fetch(name, checkpoints_dir, ranks, doing)
            if damage is None:
                if ranks.rank == 0 and MARK_NAME in objects:
                    mark(checkpoints_dir / name, self.folder.read(f"{name}/{MARK_NAME}"))
                return Pulled(name, tuple(skipped))
            skipped.append(f"{name} of {self.folder.url}: {damage}")
        if skipped and newest < 0:
            raise RuntimeError(
                f"none of the {len(skipped)} checkpoints in {self.folder.url} can be loaded: "
                + " | ".join(skipped)
                + ". Name another train.checkpoint_store to start over."
            )
        return Pulled(None, tuple(skipped))

    def _explain_taken(self, newer: Iterable[str], checkpoints_dir: Path, newest: int) -> str | None:
        """Describe a step that was saved in the folder and is now only in the store, while an older one is still here.

        None if there is none, and for a folder that lost all of them, which is what the store is for.
        """
        saved = find_saved(checkpoints_dir.parent) if newest >= 0 else set()
        saved -= {find_rollback(checkpoints_dir.parent)}  # named, so it is wanted
        taken = next((name for name in newer if step_named(name) in saved), None)
        if taken is None:
            return None
        step = step_named(taken)
        return (
            f"{self.folder.url} has {taken}, which by {checkpoints_dir.parent / 'events.jsonl'} was saved in "
            f"{checkpoints_dir} and is not there any more, while step {newest} is. To go back to step {newest}: amfm rollback "
            f"{checkpoints_dir.parent} --to {newest}. To continue from step {step} of the store: train.resume_step={step}"
        )

    def _fetch(self, name: str, checkpoints_dir: Path, ranks: RankGroup, doing: str) -> str | None:
        """Fetch one step into its place; returns what is damaged, None for nothing. All ranks must call it."""
        problem = RankFailure()
        temporary_dir, damage = checkpoints_dir, None
        files: dict[str, Any] = {}
        if ranks.rank == 0:
            with problem.caught():
                make_folders(checkpoints_dir)
                remove_temporary(checkpoints_dir)
                temporary_dir = make_temporary(checkpoints_dir, step_named(name))
                files, damage = self._fetch_manifest(name, temporary_dir)
        ranks.raise_together(problem.text, doing)
        temporary_name, files, damage = ranks.broadcast((temporary_dir.name, files, damage))
        temporary_dir = checkpoints_dir / temporary_name
        damages = [damage] if damage is not None and ranks.rank == 0 else []
        if damage is None:
            with problem.caught():
                for file, entry in list(files.items())[ranks.rank :: ranks.world_size]:
                    found = self._fetch_file(f"{name}/{file}", make_place(temporary_dir, file), entry)
                    damages += [] if found is None else [found]
        return commit_fetched(temporary_dir, name, damages, problem, ranks, doing)

    def _fetch_manifest(self, name: str, folder: Path) -> tuple[dict[str, Any], str | None]:
        """Fetch the manifest of a step and verify it: its files, and what is damaged."""
        try:
            content = self.folder.read(f"{name}/{MANIFEST_NAME}")
        except FileNotFoundError as error:
            return {}, str(error)
        with named(folder / MANIFEST_NAME):
            (folder / MANIFEST_NAME).write_bytes(content)
        sync(folder / MANIFEST_NAME)
        try:
            manifest = read_manifest(folder)
        except RuntimeError as error:
            return {}, str(error)
        if manifest["step"] != step_named(name):
            return {}, f"its manifest is of step {manifest['step']}"
        return manifest["files"], None

    def _fetch_file(self, name: str, path: Path, entry: dict[str, Any]) -> str | None:
        """Fetch a file, hashing it on the way; returns what is damaged, None for nothing."""
        try:
            with self.folder.open(name) as source:
                return copy_verified(source, path, name, entry)
        except FileNotFoundError as error:
            return str(error)


def step_named(name: str) -> int:
    """Number of a step by the name of its folder."""
    return int(name.removeprefix("step-"))
