"""A branch of a run: another run directory that continues from one of its checkpoints, with other settings from there."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from amfm.data_pipeline.durable.files import check_free, named, sync
from amfm.data_pipeline.durable.lines import read_lines
from amfm.data_pipeline.terminal import Report, silent
from amfm.pretrain.checkpoint.commit import mark
from amfm.pretrain.checkpoint.compatibility import check_resumable
from amfm.pretrain.checkpoint.inspect import require_sound
from amfm.pretrain.checkpoint.names import TEACHER_FILE, checkpoint_name, list_checkpoints, step_of
from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.event_log import append_event


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
