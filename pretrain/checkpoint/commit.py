"""Atomic commits of checkpoints: renames, the `latest` hint, marks and pruning.

A folder's name says what it is: `step-N` is complete, `step-N.tmp` is being written or left over, `step-N.old` is complete
and about to be replaced. A name changes by one rename, the only operation of a file system that happens as a whole or not
at all, and is forced to the disk by an fsync of the parent. `latest` is a hint for people: loading looks at all folders,
newest first, and verifies them.

Before the commit every failure is an error. After it the checkpoint stands, so what fails then (an old folder that cannot be
deleted, for example) is a warning for the log and ends no run.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

from amfm.data_pipeline.durable.files import make_folders, named, sync, try_to_delete
from amfm.pretrain.checkpoint.files import replace_text
from amfm.pretrain.checkpoint.manifest_file import (
    CHECKPOINT_NAME,
    EVERY,
    MANIFEST_NAME,
    MARK_NAME,
    checkpoint_name,
    encode_manifest,
    list_checkpoints,
    read_manifest,
)

LATEST_NAME = "latest"
# Numbered where one of the name cannot be deleted.
TEMPORARY_NAME = re.compile(r"step-\d{8,}(\.old)?(\.\d+)?\.tmp")
MAX_LEFTOVERS = 100


class RankFailure:
    """Keeps the first thing that went wrong on this rank, so that all ranks can agree before any of them leaves."""

    def __init__(self) -> None:
        self.text: str | None = None

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Keep an error of the machine or of the values as text; later blocks are the caller's to skip."""
        try:
            yield
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            self.text = self.text or f"{error.strerror or error}{where}"
        except (RuntimeError, ValueError) as error:
            self.text = self.text or str(error)


def make_checkpoints_folder(checkpoints_dir: Path) -> None:
    """Make the folder of a run's checkpoints and write into it, so that a place that takes none fails the start.

    Raises OSError with the path.
    """
    make_folders(checkpoints_dir)
    probe = checkpoints_dir / f".writing-{os.getpid()}"
    with named(probe):
        probe.touch()
        probe.unlink()


def remove_temporary(checkpoints_dir: Path) -> list[str]:
    """Remove what an interrupted save left behind, and warning on what cannot be. One rank calls it, while no one
    saves.
    """
    found = [path for path in checkpoints_dir.iterdir() if TEMPORARY_NAME.fullmatch(path.name)]
    return [remark for path in found for remark in try_to_delete(path, TEMPORARY_NAME)]


def make_temporary(checkpoints_dir: Path, step: int) -> Path:
    """Make the folder in which a checkpoint is written, numbered when an older one of its name cannot be removed."""
    for path in temporary_paths(checkpoints_dir / checkpoint_name(step)):
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise RuntimeError(f"{checkpoints_dir} is full of leftovers of step {step} that cannot be deleted; delete *.tmp")


def temporary_paths(checkpoint_dir: Path) -> Iterator[Path]:
    """Yield the names under which a checkpoint is written or deleted: `.tmp`, then numbered ones, MAX_LEFTOVERS in all."""
    yield checkpoint_dir.with_name(f"{checkpoint_dir.name}.tmp")
    for number in range(1, MAX_LEFTOVERS):
        yield checkpoint_dir.with_name(f"{checkpoint_dir.name}.{number}.tmp")


def discard(checkpoint_dir: Path) -> list[str]:
    """Remove a checkpoint, and warning on what stays; renamed first, so that a kill leaves no broken one of its name.

    Raises OSError when it cannot even be renamed.
    """
    doomed_dir = next(path for path in temporary_paths(checkpoint_dir) if not os.path.lexists(path))
    os.rename(checkpoint_dir, doomed_dir)
    return try_to_delete(doomed_dir, TEMPORARY_NAME)


def is_marked(checkpoint_dir: Path) -> bool:
    """Whether pruning must keep a checkpoint."""
    return (checkpoint_dir / MARK_NAME).exists()


def mark(checkpoint_dir: Path, content: bytes = b"") -> None:
    """Mark a checkpoint to be kept for good; any file of the mark's name does the same. content: EVERY for a setting's mark."""
    (checkpoint_dir / MARK_NAME).write_bytes(content)
    sync(checkpoint_dir)


def is_named(checkpoint_dir: Path) -> bool:
    """Whether someone marked a checkpoint, and not `train.keep_every_steps`."""
    return is_marked(checkpoint_dir) and (checkpoint_dir / MARK_NAME).read_bytes() != EVERY


def move_aside(checkpoint_dir: Path) -> list[str]:
    """Take a checkpoint out of the way of another of its step; returns warnings. One that someone marked only gets another name."""
    if not is_named(checkpoint_dir):
        return discard(checkpoint_dir)
    step = checkpoint_dir.name.removesuffix(".old")
    names = (checkpoint_dir.with_name(f"{step}.replaced-{number}") for number in count(1))
    place = next(path for path in names if not os.path.lexists(path))
    os.rename(checkpoint_dir, place)
    return [f"{place} is what {step} was before: someone had marked it, and the run came to this step again"]


def release(checkpoint_dir: Path) -> None:
    """Unmark a checkpoint, so that pruning may remove it."""
    (checkpoint_dir / MARK_NAME).unlink(missing_ok=True)


def check_free_space(checkpoints_dir: Path, needed_bytes: int) -> None:
    """Raise RuntimeError when the disk below the folder has less room than a save needs."""
    free_bytes = shutil.disk_usage(checkpoints_dir).free
    if free_bytes < needed_bytes:
        raise RuntimeError(
            f"not enough space in {checkpoints_dir}: the checkpoint needs {needed_bytes} bytes, {free_bytes} are free; "
            "free some, lower train.keep_last or move run.dir"
        )


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is complete, and what went wrong around it without harm (only on rank 0)."""

    path: Path
    remarks: tuple[str, ...] = ()
    event: ClassVar[str] = "checkpoint"

    def facts(self) -> dict[str, Any]:
        """What its event says."""
        return {"path": self.name} | ({"remarks": list(self.remarks)} if self.remarks else {})

    def warnings(self) -> tuple[str, ...]:
        """What the user is told."""
        return self.remarks

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.path.name

    @property
    def step(self) -> int:
        """The step that it holds."""
        return int(self.name.removeprefix("step-"))


def commit(temporary_dir: Path, manifest: dict[str, Any]) -> SavedCheckpoint:
    """Turn a written temporary folder into the checkpoint of its step, durably. Rank 0 calls it, after all have reported.

    Order: manifest in place (written aside, fsync, rename), folder renamed, parent fsync'ed, `latest` renamed. Killed
    anywhere in between, the folder is either not a checkpoint or a whole one. A checkpoint of the same step steps
    aside as `.old`, still loadable, until the new one stands, which inherits its mark; one that someone marked is kept under another name. What fails after that is a warning.
    """
    checkpoints_dir = temporary_dir.parent
    final_dir = checkpoints_dir / checkpoint_name(manifest["step"])
    replaced_dir = final_dir.with_name(final_dir.name + ".old")
    remarks: list[str] = []
    replace_text(temporary_dir / MANIFEST_NAME, encode_manifest(manifest))
    if os.path.lexists(final_dir):
        if is_marked(final_dir):
            mark(temporary_dir, (final_dir / MARK_NAME).read_bytes())
        if os.path.lexists(replaced_dir):
            remarks += move_aside(replaced_dir)
        os.rename(final_dir, replaced_dir)
    os.rename(temporary_dir, final_dir)
    sync(checkpoints_dir)
    with remarked(remarks, f"{checkpoints_dir} keeps what {final_dir.name} replaces"):
        if os.path.lexists(replaced_dir):
            remarks += move_aside(replaced_dir)
    with remarked(remarks, f"{checkpoints_dir / LATEST_NAME} stays as it was"):
        replace_text(checkpoints_dir / LATEST_NAME, final_dir.name + "\n")
    return SavedCheckpoint(final_dir, tuple(remarks))


@contextmanager
def remarked(remarks: list[str], consequence: str) -> Iterator[None]:
    """After the commit: an error of the disk is a warning, because the checkpoint stands."""
    try:
        yield
    except OSError as error:
        remarks.append(f"{consequence}: {error.strerror or error} ({error.filename})")


def remove_older(checkpoints_dir: Path, step: int, keep_last: int) -> list[str]:
    """Remove all but the newest `keep_last` whole checkpoints up to `step`; returns warnings on those that cannot be.

    Marked ones neither count nor go, nor do links: who moved a checkpoint elsewhere and left a link wants to keep it. A
    folder with a broken manifest or a file of the wrong size neither counts nor goes: it cannot serve as a predecessor,
    and it may be what someone has to look at. Those of later steps stay too (a run that fell back to an older
    checkpoint will write them again). Rank 0 calls it, after the commit.
    """
    whole = []
    for path in list_checkpoints(checkpoints_dir):
        try:
            manifest = read_manifest(path)
            sizes_match = all(
                (path / name).is_file() and (path / name).stat().st_size == entry["bytes"]
                for name, entry in manifest["files"].items()
            )
        except (RuntimeError, OSError):
            continue
        if sizes_match and manifest["step"] <= step and not is_marked(path) and not path.is_symlink():
            whole.append(path)
    remarks: list[str] = []
    for path in whole[keep_last:]:
        with remarked(remarks, f"{path} is kept beyond train.keep_last"):
            remarks += discard(path)
    return remarks


def examine_latest(checkpoints_dir: Path, chosen: Path) -> str | None:
    """Describe what is odd about the `latest` hint, given the checkpoint that verification chose; None when it agrees.

    A folder that was copied into a new run directory has none.
    """
    path = checkpoints_dir / LATEST_NAME
    try:
        text = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        is_copied = not (checkpoints_dir.parent / "events.jsonl").exists()
        return None if is_copied else f"{path} is absent; took {chosen.name} by its manifest"
    except (OSError, UnicodeDecodeError) as error:
        return f"{path} cannot be read ({error}); took {chosen.name} by its manifest"
    if text == chosen.name:
        return None
    if not text:
        return f"{path} is empty; took {chosen.name} by its manifest"
    if CHECKPOINT_NAME.fullmatch(text) is None:
        return f"{path} holds {text[:60]!r}, which names no checkpoint; took {chosen.name} by its manifest"
    if not (checkpoints_dir / text).is_dir():
        return f"{path} names {text}, which does not exist; took {chosen.name} by its manifest"
    return f"{path} names {text}; took {chosen.name}, the newest that verifies"
