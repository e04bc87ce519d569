"""Checkpoint benchmark: blocking and background saves, ours and torch's, and replicas in memory, side by side.

What training waits for is the stall. A background save copies the state and lets a thread write it while steps
continue; those steps share processors and memory with the thread, so their time is shown next to that of steps without a save.
Variants take turns in every round, so that a drift of the machine favours none.
"""

from __future__ import annotations

import gc
import secrets
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver

from amfm.launch.arguments import JsonOption
from amfm.launch.bench.kernels import describe_hardware
from amfm.launch.console import print_json, print_rows, say
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.pretrain.checkpoint.background import BackgroundSaver
from amfm.pretrain.checkpoint.fragments import collect_fragments
from amfm.pretrain.checkpoint.replicas.memory import NodeMemory
from amfm.pretrain.checkpoint.save import save_checkpoint
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.config.train_and_launch import TrainConfig
from amfm.pretrain.engine.engine import ZeroEngine, build_engine
from amfm.pretrain.engine.parts import list_parts
from amfm.pretrain.parallel import initialize_parallel
from benchmarks.calibration.fit import OPTIMIZER, granite_shape
from benchmarks.command import main

ROWS, TOKENS = 1, 512
STEPS_ALONE = 3
MEMORY = TrainConfig.model_fields["replica_folder"].default


@dataclass
class Timings:
    """Seconds of every round: the stall, the time until the state is durable, and steps begun while it was written."""

    stall: list[float] = field(default_factory=list)
    durable: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    def medians(self) -> dict[str, float | None]:
        """Medians by name, None if nothing was measured."""
        return {
            f"{name}_seconds": statistics.median(values) if values else None
            for name, values in (("stall", self.stall), ("durable", self.durable), ("step_beside", self.steps))
        }


class Trainer:
    """Small model with its engine on one rank, to train steps and to save."""

    def __init__(self, num_threads: int | None) -> None:
        parallel = initialize_parallel(timeout_seconds=600, num_threads=num_threads)
        model = HybridModel(granite_shape(), parallel.groups, backend="auto", seed=0, device=parallel.device).train()
        self.engine: ZeroEngine = build_engine(
            model, optimizer=OPTIMIZER, precision="bf16", zero_stage=1, parallel=parallel
        )
        self.device = parallel.device
        self.config = RunConfig.model_validate(
            {
                "run": {"dir": "unused"},
                "model": granite_shape().model_dump(),
                "data": {"store": "unused", "sources": [{"name": "text", "paths": ["unused"]}]},
                "train": {
                    "steps": 1000,
                    "sequence_length": TOKENS,
                    "micro_batch_size": ROWS,
                    "global_batch_size": ROWS,
                },
                "optimizer": OPTIMIZER.model_dump(),
            }
        )
        self.step_number = 0

    def step(self) -> float:
        """Train one step on random tokens; returns its seconds."""
        begun = time.perf_counter()
        tokens_BT = torch.randint(0, 8192, (ROWS, TOKENS), device=self.device)
        meta = PackMeta.one_document_a_row(ROWS, TOKENS, device=self.device)
        with self.engine.accumulate(1):
            loss = self.engine.forward(tokens_BT, meta, labels=tokens_BT).loss
            self.engine.backward(loss.total / tokens_BT.numel())
        self.engine.step(OPTIMIZER.learning_rate)
        self.step_number += 1
        return time.perf_counter() - begun

    def settings(self) -> dict[str, Any]:
        """Arguments that all of our saves share."""
        return {"state": {}, "config": self.config, "identities": {}}

    def tensors(self) -> dict[str, Tensor]:
        """Master weights and moments as a plain state dict, for torch's checkpoints."""
        fragments = collect_fragments(self.engine.deepspeed, list_parts(self.engine.deepspeed))
        return {f"{kind}/{part.name}": tensor for part in fragments for kind, tensor in part.tensors.items()}


def save_blocking(trainer: Trainer, folder: Path, timings: Timings) -> None:
    """Time our save that waits until the checkpoint is durable."""
    begun = time.perf_counter()
    save_checkpoint(folder, trainer.step_number, trainer.engine, **trainer.settings(), keep_last=2)
    timings.stall.append(time.perf_counter() - begun)
    timings.durable.append(timings.stall[-1])


def time_own_save(trainer: Trainer, saver: BackgroundSaver, begin: Callable[[], object], timings: Timings) -> None:
    """Time our background save to the disk, or a replica in memory, with training steps until it stands."""
    begun = time.perf_counter()
    begin()
    timings.stall.append(time.perf_counter() - begun)
    # Training continues next to the writer, as in a run: its steps tell what the thread costs them.
    assert saver.pending is not None, "a save was begun"
    step_until(saver.pending.done, trainer, timings)
    saver.wait()
    timings.durable.append(time.perf_counter() - begun)


@contextmanager
def replicas_in_memory(saver: BackgroundSaver, config: RunConfig, run_dir: Path) -> Iterator[None]:
    """Inside, the saver writes replicas to this machine's memory, where a run would by default; none are left."""
    saver.replicas = NodeMemory.of(MEMORY, run_dir, saver.ranks)
    saver.replicas.token = secrets.token_hex(16)
    saver.replicas.check_memory(saver.measure(config), saver.ranks)
    try:
        yield
    finally:
        saver.close()
        saver.replicas.clear()


def save_torch(trainer: Trainer, folder: Path, timings: Timings) -> None:
    """Time torch.distributed.checkpoint, waiting; it neither hashes nor looks for NaN."""
    shutil.rmtree(folder, ignore_errors=True)
    begun = time.perf_counter()
    state_dict_saver.save(trainer.tensors(), checkpoint_id=folder)
    timings.stall.append(time.perf_counter() - begun)
    timings.durable.append(timings.stall[-1])


def time_torch_save(trainer: Trainer, folder: Path, timings: Timings) -> None:
    """Time torch.distributed.checkpoint in its own thread, with training steps meanwhile."""
    shutil.rmtree(folder, ignore_errors=True)
    begun = time.perf_counter()
    pending: Any = state_dict_saver.async_save(trainer.tensors(), checkpoint_id=folder)
    timings.stall.append(time.perf_counter() - begun)
    step_until(pending.done, trainer, timings)
    pending.result()
    timings.durable.append(time.perf_counter() - begun)


def step_until(is_done: Callable[[], bool], trainer: Trainer, timings: Timings) -> None:
    """Train until `is_done`; a step that outlives the writing does not count."""
    while not is_done():
        seconds = trainer.step()
        if not is_done():
            timings.steps.append(seconds)


def bench_checkpoint(
    place: Path | None, *, rounds: int, num_threads: int | None, report: Callable[[str], None]
) -> dict[str, Any]:
    """Measure all variants and return medians, and each stall's ratio to our blocking save.

    Variants take turns. The first round warms up files and memory; it is left out of the medians, and its stall stands
    next to them, because a run pays it once. `place`: a folder on the disk to measure; None: the system's folder for
    temporary files.
    """
    trainer = Trainer(num_threads)
    saver = BackgroundSaver(trainer.engine, timeout_seconds=600)
    with tempfile.TemporaryDirectory(dir=place) as root, replicas_in_memory(saver, trainer.config, Path(root)):

        def to_disk() -> object:
            return saver.save(Path(root, "background"), trainer.step_number, **trainer.settings(), keep_last=2)

        def to_memory() -> object:
            return saver.replicate(trainer.step_number, **trainer.settings())

        variants: dict[str, Callable[[Timings], None]] = {
            "blocking": lambda timings: save_blocking(trainer, Path(root, "blocking"), timings),
            "background": lambda timings: time_own_save(trainer, saver, to_disk, timings),
            "replica": lambda timings: time_own_save(trainer, saver, to_memory, timings),
            "torch_dcp": lambda timings: save_torch(trainer, Path(root, "dcp"), timings),
            "torch_dcp_async": lambda timings: time_torch_save(trainer, Path(root, "dcp_async"), timings),
        }
        trainer.step()
        first, timings = ({name: Timings() for name in variants} for _ in range(2))
        alone: list[float] = []
        for number in range(rounds + 1):
            report(f"round {number} of {rounds}" if number else "warming up")
            measured = timings if number else first
            for name, run in variants.items():
                steps = [trainer.step() for _ in range(STEPS_ALONE)]
                alone += steps if number else []
                gc.collect()
                run(measured[name])
    blocking = statistics.median(timings["blocking"].stall)
    return {
        "shape": {"rows": ROWS, "tokens": TOKENS, "model": granite_shape().model_dump()},
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in trainer.tensors().values()),
        "rounds": rounds,
        "hardware": describe_hardware(),
        "step_alone_seconds": statistics.median(alone),
        "variants": {
            name: {
                **entry.medians(),
                "ratio_to_blocking": statistics.median(entry.stall) / blocking,
                "first_stall_seconds": first[name].stall[0],
            }
            for name, entry in timings.items()
        },
    }


def checkpoint(
    *,
    folder: Annotated[Path | None, typer.Option(help="A folder on the disk to measure; default: /tmp.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed saves of each variant, taking turns.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time saving 234 MB of state: waiting for the disk, during training, and torch's own checkpoints."""

    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    result = bench_checkpoint(folder, rounds=rounds, num_threads=threads, report=say)
    if as_json:
        print_json(result)
    else:
        print_checkpoint_table(result)


def print_checkpoint_table(result: dict[str, Any]) -> None:
    """Print the variants of `bench_checkpoint` as a table, and the hardware."""
    rows = [
        (
            name,
            f"{figures['stall_seconds']:.3f}",
            f"{figures['ratio_to_blocking']:.1%}",
            f"{figures['first_stall_seconds']:.3f}",
            f"{figures['durable_seconds']:.3f}",
            f"{figures['step_beside_seconds']:.3f}" if figures["step_beside_seconds"] else "",
        )
        for name, figures in result["variants"].items()
    ]
    columns = ("variant", "training waits s", "of blocking", "first time s", "durable after s", "step meanwhile s")
    print_rows(f"Saving {result['bytes'] / 1e6:.0f} MB, medians of {result['rounds']} rounds", columns, rows)
    say(f"a step without a save takes {result['step_alone_seconds']:.3f} s")
    say(", ".join(f"{name} {value}" for name, value in result["hardware"].items()))


if __name__ == "__main__":
    main(checkpoint)
