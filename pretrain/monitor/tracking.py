"""What a run is called in TensorBoard, Weights & Biases and MLflow: its id, its commits, and its numbers in groups.

A run keeps the names that it began with: one of a release before has no tracking.json, and its curves continue as they were.
"""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from amfm.data_pipeline.durable.files import write_file_atomically
from amfm.data_pipeline.durable.json_files import read_object
from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.config.schema import RunConfig

NAME = "tracking.json"  # of the run directory
DIGITS = 3  # of blocks and experts, so that 3 sorts before 11
# Full names and beginnings, which end in a slash, of metrics.jsonl.
GROUPED = {
    "loss": "loss/train",
    "validation_loss": "loss/validation",
    "validation_bits_per_byte": "loss/validation_bits_per_byte",
    "validation_by_source/": "loss/validation_by_source/",
    "validation_sets/": "loss/validation_sets/",
    "validation_sets_at_start/": "loss/validation_sets_at_start/",
    "validation_accuracy": "loss/validation_accuracy",
    "validation_row_accuracy": "loss/validation_row_accuracy",
    "auxiliary/": "loss/auxiliary/",
    "auxiliary_mean/": "moe/auxiliary_mean/",
    "mtp_loss/": "loss/mtp/",
    "expert_load/": "moe/load/",
    "tokens_per_second": "speed/tokens_per_second",
    "tokens_per_second_per_gpu": "speed/tokens_per_second_per_gpu",
    "tflops_per_gpu": "speed/tflops_per_gpu",
    "megatron_tflops_per_gpu": "speed/megatron_tflops_per_gpu",
    "mfu": "speed/mfu",
    "seconds": "speed/seconds",
    "validation_seconds": "speed/validation_seconds",
    "tasks_seconds": "speed/tasks_seconds",
    "memory_bytes": "speed/memory_bytes",
    "allocator/": "speed/allocator/",
    "grad_norm": "health/grad_norm",
    "skipped": "health/skipped",
    "damaged_samples": "health/damaged_samples",
    "spike/": "health/spike/",
    "lr": "progress/lr",
    "tokens": "progress/tokens",
    "data/": "progress/data/",
}


@dataclass(frozen=True)
class Tracking:
    """A run's id with a service, and whether its numbers have names in groups; None and no: of a release before."""

    run_id: str | None = None
    is_grouped: bool = False

    def named(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Give flattened numbers of a step the names of this run."""
        return {group_name(name): value for name, value in numbers.items()} if self.is_grouped else dict(numbers)


def group_name(name: str) -> str:
    """Name of a flattened number in its group, with numbers of blocks in DIGITS digits; what is in no group keeps its own."""
    begin, slash, rest = name.partition("/")
    padded = "/".join(part.zfill(DIGITS) if part.isdigit() else part for part in rest.split("/"))
    return GROUPED.get(begin + slash, begin + slash) + padded


def open_tracking(directory: Path, *, resumed_at_step: int) -> Tracking:
    """Read what a run is called, or choose it where its first service begins. Raises RuntimeError for a damaged file."""
    path = directory / NAME
    if path.exists():
        found = read_object(path)
        if not isinstance(found.get("run_id"), str):
            raise RuntimeError(f"{path} is damaged: it has no run_id; remove it, and the run gets another id")
        return Tracking(found["run_id"], is_grouped=found.get("is_grouped") is True)
    if resumed_at_step and any((directory / service).exists() for service in ("tensorboard", "wandb")):
        return Tracking()
    chosen = Tracking(uuid.uuid4().hex, is_grouped=True)
    write_file_atomically(path, json.dumps(asdict(chosen)).encode())
    return chosen


class Services:
    """TensorBoard and Weights & Biases, as far as a run has them; only on the main rank.

    Losses are written over tokens too, in files of their own: an event of TensorBoard has one axis.
    """

    def __init__(self, config: RunConfig, *, resumed_at_step: int) -> None:
        self.folder = Path(config.run.dir) / "tensorboard"
        self.tracking = open_tracking(self.folder.parent, resumed_at_step=resumed_at_step)
        self.tensorboard = open_tensorboard(config, resumed_at_step) if config.run.tensorboard else None
        self.by_tokens: Any = None
        self.wandb = open_wandb(config, self.tracking) if config.run.wandb_project is not None else None

    def write_tensorboard(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write named numbers of a step. Raises OSError if the disk rejects them."""
        if self.tensorboard is None:
            return
        for name, value in numbers.items():
            self.tensorboard.add_scalar(name, value, step)
        if "progress/tokens" not in numbers:
            return
        tokens = int(numbers["progress/tokens"])
        if self.by_tokens is None:
            from torch.utils.tensorboard import SummaryWriter

            self.by_tokens = SummaryWriter(str(self.folder / "by_tokens"), purge_step=tokens)
        for name, value in numbers.items():
            if name.startswith("loss/"):
                self.by_tokens.add_scalar(f"loss_by_tokens/{name.removeprefix('loss/')}", value, tokens)

    def write_wandb(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write named numbers of a step."""
        if self.wandb is not None:
            self.wandb.log(dict(numbers), step=step)

    def close_tensorboard(self) -> None:
        """Flush and close. Raises OSError if the disk rejects what is left."""
        for writer in (self.tensorboard, self.by_tokens):
            if writer is not None:
                writer.close()

    def finish_wandb(self) -> None:
        """Send what is left."""
        if self.wandb is not None:
            self.wandb.finish()


def open_tensorboard(config: RunConfig, resumed_at_step: int) -> Any:
    """Open a TensorBoard writer; points of steps that will be done again disappear from the plots.

    Its texts are the commits and the settings of this start.
    """
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(Path(config.run.dir) / "tensorboard"), purge_step=resumed_at_step + 1)
    for name, commit in read_commits().items():
        writer.add_text(f"run/commit_of_{name}", commit, resumed_at_step)
    indented = "".join(f"    {line}\n" for line in resolved_yaml(config).splitlines())
    writer.add_text("run/settings", indented, resumed_at_step)
    return writer


def open_wandb(config: RunConfig, tracking: Tracking) -> Any:
    """Join or start the Weights & Biases run of this run, so that a resumed run continues its curves.

    Losses have tokens as their axis there, other numbers steps. One of a release before is found by its name.
    """
    import wandb

    name = config.run.name or Path(config.run.dir).name
    run = wandb.init(
        project=config.run.wandb_project,
        name=name,
        id=tracking.run_id or name,
        resume="allow",
        dir=config.run.dir,
        config=config.model_dump(mode="json") | {"commits": read_commits()},
    )
    if tracking.is_grouped:
        run.define_metric("progress/tokens")
        run.define_metric("loss/*", step_metric="progress/tokens")
    return run


def read_commits() -> dict[str, str]:
    """Commits of the checkouts that hold the code and the settings of this command, which it is given in; those there are.

    With `-dirty` where files differ from it.
    """
    places = {"code": Path(__file__).resolve().parent, "settings": Path.cwd()}
    return {name: commit for name, place in places.items() if (commit := read_commit(place))}


def read_commit(folder: Path) -> str:
    """Commit of the checkout that holds a folder; empty if there is none, or no git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
