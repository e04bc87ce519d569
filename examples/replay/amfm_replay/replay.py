"""Compute steps of a finished run again from a checkpoint, and compare what they gave with the run's records, bitwise.

The steps are trained by the loop as it is, in another run directory, from the newest checkpoint before the step that was
asked for, or from the beginning if there is none, with the configuration and the ranks of each start that trained some of
them; the run stays as it is. The line of each step in
metrics.jsonl has the loss and the gradient norm with all their digits, and where the run has a checkpoint of the last step,
every number of it is compared. Equal code, libraries and ranks give equal bits on a CPU, and on GPUs with
`train.deterministic`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from amfm.data_pipeline.durable.files import check_free
from amfm.data_pipeline.terminal import Report, silent
from amfm.pretrain.checkpoint.inspect import require_sound
from amfm.pretrain.checkpoint.manifest_file import checkpoint_name, list_checkpoints, step_of
from amfm.pretrain.checkpoint.reader import RangeReader, kinds_of
from amfm.pretrain.config.file import load_config, resolved_yaml
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.packages import OWN_CODE, collect_versions
from amfm.pretrain.report.data import Attempt, list_attempts, read_run
from amfm.pretrain.rollback import copy_teacher, fork_run

# What a step computes, in the order in which it does; the rest of its line depends on time and machine.
NUMBERS = ("lr", "tokens", "loss", "auxiliary", "mtp_loss", "expert_load", "grad_norm", "skipped")
# Of the run again: what no number depends on is not done a second time.
ALONE = (
    *("run.name=null", "run.tensorboard=false", "run.wandb_project=null", "train.resume_step=null"),
    *("train.checkpoint_store=null", "train.checkpoint_every_steps=null", "train.keep_every_steps=null"),
    *("train.replica_every_steps=null", "train.validate_every_steps=null", "train.stop_after_minutes=null"),
    *("train.profile=null", "evaluate.tasks=[]", "validation=[]"),
)


@dataclass(frozen=True)
class Leg:
    """Steps that starts with equal settings and ranks trained, up to `last`."""

    last: int
    world_size: int
    config: RunConfig

    def write(self, path: Path) -> None:
        """Write the configuration that ends with the leg."""
        train = self.config.train.model_copy(update={"stop_after_steps": self.last})
        path.write_text(resolved_yaml(self.config.model_copy(update={"train": train})), encoding="utf-8")


@dataclass(frozen=True)
class Replay:
    """Steps `first` to `last` are to be trained in `path`, leg after leg. warnings: what may change bits."""

    path: Path
    first: int
    last: int
    legs: tuple[Leg, ...]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Difference:
    """The first number that was not given again: of a step's line, or of a tensor in the last step's checkpoint.

    rank: of the run, which wrote that part of the tensor; index: of the number in the whole tensor's part that it wrote.
    """

    step: int
    name: str
    recorded: Any
    computed: Any
    rank: int | None = None
    index: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What was found: the first difference, None if all is equal, and whether the run has a checkpoint of the last step.

    tensors: in how many parts of parameters, moments and buffers of that checkpoint a bit differs. weights_sha256, loss and
    grad_norm: of the last step as it was computed.
    """

    difference: Difference | None
    weights_sha256: str
    has_checkpoint: bool
    tensors: int
    loss: float | None
    grad_norm: float | None


def prepare_replay(
    run_dir: Path, step: int, out: Path, *, num_ranks: int | None = None, report: Report = silent
) -> Replay:
    """Make `out` a run that trains up to this step from the checkpoint before it; num_ranks: None as it was.

    Raises ValueError for a step that the run did not train, and if its records do not show how; RuntimeError if the
    checkpoint is damaged.
    """
    record = read_run(run_dir)
    if step not in {line["step"] for line in record.metrics}:
        raise ValueError(f"--step {step}: {run_dir} has steps 1 to {record.last_step()}")
    saved = sorted(step_of(path) for path in list_checkpoints(run_dir / "checkpoints"))
    before = max((each for each in saved if each < step), default=0)
    starts = list_attempts(record.events, record.last_step())
    turns = find_turns(starts, before + 1, step)
    if not turns:
        raise ValueError(
            f"--step {step}: the events of {run_dir} do not show which starts trained steps {before + 1:,} to {step:,}"
        )
    legs: list[Leg] = []
    for start, last in turns:
        leg = Leg(last, num_ranks or int(start.event["world_size"]), read_config(run_dir, start, step, out))
        # Of equal settings and ranks one start does the steps of both.
        is_same = legs and (legs[-1].world_size, legs[-1].config) == (leg.world_size, leg.config)
        legs[-1 if is_same else len(legs) :] = [leg]
    if before:
        fork_run(run_dir, before, legs[0].config, report)
    else:
        check_free(out)
        out.mkdir(parents=True, exist_ok=True)
        copy_teacher(run_dir, out)
    remarks = dict.fromkeys(each for start, _ in turns for each in describe_changes(start.event, num_ranks))
    return Replay(out, before + 1, step, tuple(legs), tuple(remarks))


def find_turns(starts: Sequence[Attempt], first: int, last: int) -> list[tuple[Attempt, int]]:
    """Starts that trained these steps, in order, each with the last step of its turn; empty if a step has none."""
    turns: list[tuple[Attempt, int]] = []
    for step in range(first, last + 1):
        start = next((start for start in starts if start.keeps(step)), None)
        if start is None:
            return []
        if turns and turns[-1][0] is start:
            turns.pop()
        turns.append((start, step))
    return turns


def read_config(run_dir: Path, start: Attempt, step: int, out: Path) -> RunConfig:
    """The configuration of a start, for a run in `out` that ends at this step and does nothing besides."""
    recorded = run_dir / str(start.event.get("config") or "config.yaml")
    if not recorded.is_file():
        raise ValueError(
            f"--step {step}: {recorded}, the configuration of start {start.number}, is missing; put it back"
        )
    own = [f"run.dir={json.dumps(str(out))}", f"train.stop_after_steps={step}"]
    return load_config(recorded, [*ALONE, *own])


def describe_changes(event: Mapping[str, Any], num_ranks: int | None) -> Iterator[str]:
    """What is not as it was when the run trained these steps, as sentences."""
    now = collect_versions()
    then = {**(event.get("versions") or {}), OWN_CODE: event.get("code")}
    for name, version in then.items():
        if version is not None and now.get(name) != version:
            yield f"{name} was {version} and is {now.get(name)}"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if event.get("device") not in (None, device):
        yield f"the run was trained on {event['device']}, this is {device}"
    if num_ranks not in (None, event.get("world_size")):
        yield f"the run had {event.get('world_size')} ranks, this has {num_ranks}"


def compare_replay(run_dir: Path, replay: Replay, report: Report = silent) -> Outcome:
    """Compare the steps that were trained again with the run's: their lines, then the checkpoint after the last."""
    lines = [{line["step"]: line for line in read_run(path).metrics} for path in (run_dir, replay.path)]
    difference: Difference | None = None
    for step in range(replay.first, replay.last + 1):
        recorded, computed = (by_step.get(step, {}) for by_step in lines)
        unlike = [name for name in NUMBERS if recorded.get(name) != computed.get(name)]
        if unlike:
            difference = Difference(step, unlike[0], recorded.get(unlike[0]), computed.get(unlike[0]))
            break
    checkpoint = replay.path / "checkpoints" / checkpoint_name(replay.last)
    manifest = require_sound(checkpoint, report)
    theirs = run_dir / "checkpoints" / checkpoint.name
    has_checkpoint, tensors = theirs.is_dir(), 0
    if has_checkpoint:
        found = list(find_unlike((theirs, require_sound(theirs, report)), (checkpoint, manifest), replay.last))
        difference, tensors = difference or next(iter(found), None), len(found)
    last = lines[1].get(replay.last, {})
    digest = digest_weights(checkpoint, manifest)
    return Outcome(difference, digest, has_checkpoint, tensors, last.get("loss"), last.get("grad_norm"))


Checkpoint = tuple[Path, dict[str, Any]]  # verified, with its manifest


def find_unlike(recorded: Checkpoint, computed: Checkpoint, step: int) -> Iterator[Difference]:
    """The first number of each tensor that differs in a bit, by the ranges that the ranks of the run wrote."""
    one, other = (RangeReader(*checkpoint) for checkpoint in (recorded, computed))
    for name in recorded[1]["parameters"]:
        for kind in kinds_of(recorded[1], name):
            for shard in one.shards(name):
                for start, numel, file in shard.ranges:
                    pair = torch.empty(numel), torch.empty(numel)
                    for reader, flat in zip((one, other), pair):
                        reader.fill(flat, kind, name, shard.placement, start)
                    yield from first_unlike(*pair, step, f"{kind} of {name}", file, start)
    for name, entry in recorded[1]["buffers"].items():
        pair = one.buffer(name).reshape(-1), other.buffer(name).reshape(-1)
        yield from first_unlike(*pair, step, f"buffer {name}", entry["file"], 0)


def first_unlike(
    recorded: Tensor, computed: Tensor, step: int, name: str, file: str, start: int
) -> Iterator[Difference]:
    """The first number in which two flat tensors differ, compared as bytes."""
    size = recorded.element_size()
    unlike = (recorded.view(torch.uint8) != computed.view(torch.uint8)).view(-1, size).any(1).nonzero()
    if len(unlike):
        index = int(unlike[0])
        rank = int(PurePath(file).stem.removeprefix("rank-"))
        yield Difference(step, name, recorded[index].item(), computed[index].item(), rank, start + index)


def digest_weights(checkpoint_dir: Path, manifest: dict[str, Any]) -> str:
    """SHA-256 of all whole float32 weights in the order of their names: the same under every layout."""
    reader, digest = RangeReader(checkpoint_dir, manifest), hashlib.sha256()
    for name in sorted(manifest["parameters"]):
        digest.update(name.encode() + b"\0" + reader.whole("weight", name).numpy().tobytes())
    return digest.hexdigest()
