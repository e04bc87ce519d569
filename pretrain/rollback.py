"""Going back to an earlier checkpoint on purpose, and forward again: `amfm rollback` and `train.resume_step`.

Nothing is deleted. The checkpoints of later steps move into a folder `rolled-back-K`, in the run directory and in
`train.checkpoint_store` alike, if no start, fetch or pruning looks. Lines of metrics.jsonl that the run drops go to
`metrics.before-rollback-K.jsonl`. The checkpoint that was named is marked, so that it is never pruned. Replicas in the
memory of nodes cannot be reached from here: the run directory gets another owner, so that no start takes them for
its newest state, and the next start moves the newest one to the others (saving.py).

Order: the record, the copy of the metrics, the store, the run directory, newest step first, then metrics.jsonl and the
event. Killed anywhere, each checkpoint is under one of its two names, and the same command does the rest under the next
number.

A branch of a run is another run directory that continues from one of its checkpoints, with other settings from there.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from amfm.data_pipeline.durable.files import check_free, make_folders, named, replacing, sync, write_file_atomically
from amfm.data_pipeline.durable.json_files import parse_object, read_lines, read_object, understood
from amfm.data_pipeline.terminal import Report, silent
from amfm.pretrain.checkpoint.commit import LATEST_NAME, RankFailure, mark
from amfm.pretrain.checkpoint.compatibility import check_resumable
from amfm.pretrain.checkpoint.files import replace_text
from amfm.pretrain.checkpoint.inspect import require_sound
from amfm.pretrain.checkpoint.manifest_file import (
    MANIFEST_NAME,
    MARK_NAME,
    TEACHER_FILE,
    checkpoint_name,
    list_checkpoints,
    read_manifest,
    step_of,
)
from amfm.pretrain.checkpoint.remote import RemoteCheckpoints, step_named
from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.launcher_protocol import append_event, find_rollback, is_rolled_back
from amfm.pretrain.monitor.metrics import keep_until
from amfm.pretrain.monitor.ownership import Ownership, read_owner
from amfm.pretrain.ranks.group import RankGroup

RECORD_NAME = "rollback.json"
RECORD = re.compile(rf"rolled-back-\d+/{re.escape(RECORD_NAME)}")


@dataclass(frozen=True)
class Rollback:
    """One rollback, as its record says.

    step: gone back to; sha256: of the manifest of that checkpoint. steps: set aside. by: what asked for it. replicas_of: the start
    whose replicas were left in the memory of nodes. undone_by: the rollback that set aside what came instead, once it
    is taken back.
    """

    number: int
    step: int
    sha256: str
    steps: tuple[int, ...]
    by: str
    time: str
    replicas_of: str | None = None
    undone_by: int | None = None

    @property
    def folder(self) -> str:
        """Name of the folder of what was set aside, below that of the checkpoints."""
        return f"rolled-back-{self.number}"

    def encode(self) -> bytes:
        """The record as it is written."""
        return json.dumps(asdict(self)).encode() + b"\n"


def metrics_before(run_dir: Path, number: int) -> Path:
    """File of the lines of metrics.jsonl that a rollback dropped."""
    return run_dir / f"metrics.before-rollback-{number}.jsonl"


def list_rollbacks(run_dir: Path, remote: RemoteCheckpoints | None) -> list[Rollback]:
    """List the rollbacks whose checkpoints are still set aside, here or in the store, oldest first."""
    checkpoints_dir = run_dir / "checkpoints"
    found: dict[int, Rollback] = {}
    if remote is not None:
        for name in [facts.name for facts in remote.folder.list() if RECORD.fullmatch(facts.name)]:
            made = understand(parse_object(remote.folder.read(name), f"{remote.folder.url}/{name}"))
            found[made.number] = made
    for path in checkpoints_dir.glob(f"rolled-back-*/{RECORD_NAME}"):
        made = understand(read_object(path))
        found[made.number] = made
    return [found[number] for number in sorted(found)]


def find_new_rollback(run_dir: Path) -> Rollback | None:
    """The newest rollback of a run that was not started since; None if there is none."""
    rollbacks = list_rollbacks(run_dir, None) if is_rolled_back(run_dir) else []
    return rollbacks[-1] if rollbacks else None


def understand(record: Mapping[str, Any]) -> Rollback:
    """The rollback of a record; ValueError for one that was edited."""
    with understood(RECORD_NAME):
        return Rollback(**{**record, "steps": tuple(record["steps"])})


def roll_back(run_dir: Path, step: int, remote: RemoteCheckpoints | None, *, by: str) -> Rollback:
    """Make a step the newest of a run: set aside all later ones, and mark it. The caller holds the run's lock.

    Raises ValueError if neither the run directory nor the store has a whole checkpoint of it, RuntimeError if the store
    does not answer, OSError where the disk rejects.
    """
    checkpoints_dir = run_dir / "checkpoints"
    there = {} if remote is None else remote.list_whole()
    digest = find_target(run_dir, step, remote, there)
    here = [path for path in list_checkpoints(checkpoints_dir) if step_of(path) > step]
    later = [name for name in there if step_named(name) > step]
    owner = read_owner(run_dir)
    made = Rollback(
        number=1 + max((each.number for each in list_rollbacks(run_dir, remote)), default=0),
        step=step,
        sha256=digest,
        steps=tuple(sorted({*map(step_of, here), *(step_named(name) for name in later)})),
        by=by,
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        replicas_of=None if owner is None else owner.get("token"),
    )
    make_folders(checkpoints_dir / made.folder)
    write_file_atomically(checkpoints_dir / made.folder / RECORD_NAME, made.encode())
    copy_later_lines(run_dir, made)
    if remote is not None:
        remote.folder.write(f"{made.folder}/{RECORD_NAME}", made.encode())
        for name in later:
            remote.rename(name, f"{made.folder}/{name}", there[name])
        if checkpoint_name(step) in there:
            remote.folder.write(f"{checkpoint_name(step)}/{MARK_NAME}", b"")
    for path in here:
        move(path, checkpoints_dir / made.folder)
    if (checkpoints_dir / checkpoint_name(step)).is_dir():
        mark(checkpoints_dir / checkpoint_name(step))
        replace_text(checkpoints_dir / LATEST_NAME, checkpoint_name(step) + "\n")
    cut = keep_until(run_dir / "metrics.jsonl", step)
    if owner is not None:
        Ownership.take(run_dir)
    facts = {"number": made.number, "steps": list(made.steps), "by": by}
    append_event(run_dir, "rolled_back_to", step, **facts, **cut.facts())
    return made


def find_target(run_dir: Path, step: int, remote: RemoteCheckpoints | None, there: Mapping[str, Sequence[str]]) -> str:
    """SHA-256 of the manifest of a step's checkpoint, here or else in the store. ValueError if neither has a whole one."""
    name, checkpoints_dir = checkpoint_name(step), run_dir / "checkpoints"
    if (checkpoints_dir / name).is_dir():
        try:
            return str(read_manifest(checkpoints_dir / name)["sha256"])
        except RuntimeError as error:
            raise ValueError(f"the checkpoint of step {step} is damaged: {error}; name another step") from error
    if remote is not None and name in there:
        content = remote.folder.read(f"{name}/{MANIFEST_NAME}")
        return str(parse_object(content, f"{remote.folder.url}/{name}/{MANIFEST_NAME}").get("sha256"))
    steps = sorted({*map(step_of, list_checkpoints(checkpoints_dir)), *(step_named(each) for each in there)})
    places = f"{checkpoints_dir}" + ("" if remote is None else f" and {remote.folder.url}")
    known = f"use one of {', '.join(map(str, steps))}" if steps else "there are none at all"
    raise ValueError(f"there is no checkpoint of step {step} in {places}; {known}")


def roll_forward(run_dir: Path, number: int, remote: RemoteCheckpoints | None) -> Rollback:
    """Take a rollback back: what it set aside returns, and what was trained since then is set aside instead.

    Returns the rollback that holds what was trained since. The caller holds the run's lock. Raises ValueError for a number that is not set aside, or whose step was trained again, and otherwise as `roll_back`.
    """
    rollbacks = {each.number: each for each in list_rollbacks(run_dir, remote)}
    if number not in rollbacks:
        known = f"use one of {', '.join(map(str, rollbacks))}" if rollbacks else "nothing is set aside"
        raise ValueError(f"rollback {number} of {run_dir} is not set aside; {known}")
    taken, checkpoints_dir = rollbacks[number], run_dir / "checkpoints"
    there = {} if remote is None else remote.list_whole()
    if find_target(run_dir, taken.step, remote, there) != taken.sha256:
        raise ValueError(
            f"rollback {number} set aside what followed another checkpoint of step {taken.step} than the present one; "
            "take back the rollback after it first"
        )
    if taken.undone_by is None:
        # Killed later, the same command must not set aside what it has brought back already.
        taken = replace(taken, undone_by=roll_back(run_dir, taken.step, remote, by=f"--undo {number}").number)
        make_folders(checkpoints_dir / taken.folder)
        write_file_atomically(checkpoints_dir / taken.folder / RECORD_NAME, taken.encode())
    if remote is not None:
        for name, objects in reversed(remote.list_whole(taken.folder).items()):
            remote.rename(f"{taken.folder}/{name}", name, objects)
    for path in reversed(list_checkpoints(checkpoints_dir / taken.folder)):
        move(path, checkpoints_dir)
    newest = list_checkpoints(checkpoints_dir)
    if newest:
        replace_text(checkpoints_dir / LATEST_NAME, newest[0].name + "\n")
    bring_back_lines(run_dir, taken)
    append_event(
        run_dir, "rolled_forward", max(taken.steps, default=taken.step), number=number, steps=list(taken.steps)
    )
    for name in (RECORD_NAME, LATEST_NAME):
        (checkpoints_dir / taken.folder / name).unlink(missing_ok=True)
    (checkpoints_dir / taken.folder).rmdir()
    if remote is not None:
        remote.folder.delete([f"{taken.folder}/{RECORD_NAME}"])
    return next(each for each in list_rollbacks(run_dir, remote) if each.number == taken.undone_by)


def roll_back_once(run_dir: Path, step: int, remote: RemoteCheckpoints | None, ranks: RankGroup) -> None:
    """`train.resume_step`: roll back, unless the newest rollback of the run was to this step. All ranks must call it.

    A run directory that was lost has no events; then the records in the store count. Raises as `roll_back`, on all ranks.
    """
    problem, refusal = RankFailure(), None
    if ranks.rank == 0:
        with problem.caught():
            done = find_rollback(run_dir)
            if done is None:
                done = next((each.step for each in reversed(list_rollbacks(run_dir, remote))), None)
            try:
                if done != step:
                    roll_back(run_dir, step, remote, by="train.resume_step")
            except ValueError as error:
                refusal = f"train.resume_step={step}: {error}"
    ranks.raise_together(problem.text, f"the run did not go back to step {step}")
    refusal = ranks.broadcast(refusal)
    if refusal is not None:
        raise ValueError(refusal)


def move(path: Path, folder: Path) -> None:
    """Move a checkpoint durably into another folder of the same disk; a link keeps leading to what it led to."""
    if path.is_symlink():
        (folder / path.name).symlink_to(path.resolve())
        path.unlink()
    else:
        os.rename(path, folder / path.name)
    sync(folder)
    sync(path.parent)


def copy_later_lines(run_dir: Path, made: Rollback) -> None:
    """Copy the lines of metrics.jsonl after the step of a rollback to a file of its own, if there are any."""
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if line["step"] > made.step]
    if lines:
        write_lines(metrics_before(run_dir, made.number), lines)


def bring_back_lines(run_dir: Path, taken: Rollback) -> None:
    """Join the lines that a rollback dropped with those of metrics.jsonl, and remove their file."""
    path = metrics_before(run_dir, taken.number)
    if path.is_file():
        lines = {line["step"]: line for file in (path, run_dir / "metrics.jsonl") for line in read_metrics(file)}
        write_lines(run_dir / "metrics.jsonl", [lines[step] for step in sorted(lines)])
        path.unlink()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of metrics that have a step; none where the file is absent."""
    for _, line in read_lines(path) if path.is_file() else ():
        if line is not None and isinstance(line.get("step"), int):
            yield line


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file of lines at once."""
    with replacing(path) as file:
        for line in lines:
            file.write(json.dumps(line).encode() + b"\n")


@dataclass(frozen=True)
class Fork:
    """A branch: its run directory, the step that it continues from, and what it changes, as sentences."""

    path: Path
    step: int
    changes: tuple[str, ...]


def fork_run(run_dir: Path, step: int, config: RunConfig, report: Report = silent) -> Fork:
    """Make `config.run.dir` a run that continues from a checkpoint of another, whole or not at all.

    It gets that checkpoint, kept for good, the configuration, and the lines of metrics.jsonl and events.jsonl up to the
    step; the run that it came from stays as it is. Raises ValueError for a step without a checkpoint, changes that a
    resume rejects and a directory in use, RuntimeError for a damaged checkpoint.
    """
    out, there = (
        Path(config.run.dir),
        {step_of(path): path for path in reversed(list_checkpoints(run_dir / "checkpoints"))},
    )
    if step not in there:
        steps = ", ".join(map(str, sorted(there))) or "(none)"
        raise ValueError(f"--step {step}: {run_dir} has checkpoints of steps {steps}")
    check_free(out)
    manifest = require_sound(there[step], report)
    changes = check_resumable(manifest, config, manifest["identities"])
    report(f"writing {out}")
    temporary = out.resolve().with_name(f".{out.name}.fork")
    shutil.rmtree(temporary, ignore_errors=True)  # of a fork that was killed
    try:
        with named(temporary):
            temporary.mkdir()  # rejected if a link has the name
            copied = temporary / "checkpoints" / checkpoint_name(step)
            shutil.copytree(there[step], copied, copy_function=link)
            mark(copied)
            (temporary / "config.yaml").write_text(resolved_yaml(config), encoding="utf-8")
            for name in ("metrics.jsonl", "events.jsonl"):
                copy_lines(run_dir / name, temporary / name, step)
            copy_teacher(run_dir, temporary)
            append_event(temporary, "forked", step, source=str(run_dir), changes=list(changes))
            if out.exists():
                out.rmdir()
            os.rename(temporary, out)
            sync(out.resolve().parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Fork(out, step, changes)


def link(source: str, target: str) -> None:
    """Give a file of a checkpoint, which never changes, a second name; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def copy_teacher(run_dir: Path, out: Path) -> None:
    """Copy which weights teach, where any do."""
    if (run_dir / TEACHER_FILE).is_file():
        shutil.copy2(run_dir / TEACHER_FILE, out / TEACHER_FILE)


def copy_lines(source: Path, target: Path, step: int) -> None:
    """Copy the lines of a log up to a step; those that cannot be read are left out."""
    with target.open("w", encoding="utf-8") as file:
        for _, record in read_lines(source) if source.is_file() else ():
            if record is not None and isinstance(record.get("step"), int) and record["step"] <= step:
                file.write(json.dumps(record) + "\n")
