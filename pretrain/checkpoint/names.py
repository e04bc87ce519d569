"""Names of checkpoints: which folders are complete ones, and the newest step among them.

Apart from the rest, and without torch, so that a launcher knows at once where a run will continue.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from amfm.pretrain.launcher_protocol import find_rollback

if TYPE_CHECKING:
    from amfm.pretrain.config.schema import RunConfig

# `step-N.old` is a complete checkpoint that is being replaced by another of the same step.
CHECKPOINT_NAME = re.compile(r"step-(\d{8,})(\.old)?")
TEACHER_FILE = "teacher.json"  # of a run directory: which weights the path of a teacher meant at its start


def checkpoint_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def list_checkpoints(checkpoints_dir: Path) -> list[Path]:
    """List the folders that are checkpoints by name, newest step first, a replaced one after its successor."""
    if not checkpoints_dir.is_dir():
        return []
    found = []
    for path in checkpoints_dir.iterdir():
        match = CHECKPOINT_NAME.fullmatch(path.name)
        if match is not None and path.is_dir():
            found.append((int(match[1]), match[2] is None, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def newest_saved_step(run_dir: str | Path) -> int:
    """Step of the newest complete checkpoint of a run by its name, -1 without one."""
    found = list_checkpoints(Path(run_dir) / "checkpoints")
    return step_of(found[0]) if found else -1


def continued_step(config: RunConfig) -> int:
    """Step that the next start of a run continues from, -1 for none: that of `train.resume_step`, until it went back there."""
    run_dir, step = Path(config.run.dir), config.train.resume_step
    return newest_saved_step(run_dir) if step is None or find_rollback(run_dir) == step else step


def step_of(checkpoint: Path) -> int:
    """Step of a folder that is a checkpoint by name."""
    match = CHECKPOINT_NAME.fullmatch(checkpoint.name)
    assert match is not None, f"{checkpoint.name} is not the name of a checkpoint"
    return int(match[1])
