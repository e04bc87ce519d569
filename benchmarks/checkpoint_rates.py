"""Bytes per second of checkpoints, saved and loaded, next to torch.save and torch.load and to a plain file, in turns.

How it works: each way writes the same state of a small model and waits until it is durable, and reads it back. Ours counts
bytes, looks for NaN and hashes while it writes, and verifies while it reads; the other ways check nothing. Rates are by the clock and by
seconds of the process on its processors: on a slow disk all ways wait for it, and the second kind shows what checks cost.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from amfm.data_pipeline.memory import keep_freed_memory
from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_rows
from amfm.pretrain.checkpoint.engine_layout import EngineLayout
from amfm.pretrain.checkpoint.load import load_newest
from benchmarks.checkpoint import Timings, Trainer, save_blocking
from benchmarks.command import main

Times = dict[str, list[tuple[float, float]]]  # by the clock, on processors
WAYS = ("amfm", "torch", "plain file")


def checkpoint_rates(
    *,
    folder: Annotated[Path | None, typer.Option(help="A folder on the disk to measure; default: /tmp.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds, after one that warms up.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Measure rates of saving and loading 234 MB of state, with one thread."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(1)
    keep_freed_memory()  # as a run does
    trainer.step()
    state = trainer.tensors()
    num_bytes = sum(each.numel() * each.element_size() for each in state.values())
    with tempfile.TemporaryDirectory(dir=folder) as root:
        times = measure(trainer, state, Path(root), rounds)
    rows = [
        {"what": f"{what}, {way}", **rates_of(times[f"{what} {way}"], num_bytes), **ratios_of(times, what, way)}
        for what in ("save", "load")
        for way in WAYS
    ]
    if as_json:
        print_json({"bytes": num_bytes, "rates": rows})
        return
    shown = [
        (row["what"], f"{row['clock']:.2f}", f"{row['cpu']:.2f}", f"{row['clock_of_torch']:.2f}",
         f"{row['cpu_of_torch']:.2f}") for row in rows
    ]  # fmt: skip
    columns = ("what", "GB/s by the clock", "GB per CPU s", "time, times torch's", "CPU s, times torch's")
    print_rows(f"Rates of {num_bytes / 1e6:.0f} MB, medians of {rounds} rounds", columns, shown)


def measure(trainer: Trainer, state: dict[str, Tensor], root: Path, rounds: int) -> Times:
    """Seconds of each way, which take turns."""
    flat = torch.cat([each.detach().reshape(-1).view(torch.uint8) for each in state.values()]).numpy()
    layout = EngineLayout.of(trainer.engine)

    def load_ours() -> None:
        found = load_newest(root / "ours", layout, config=trainer.config, identities={})
        assert found is not None, "it was saved"

    ways: dict[str, Callable[[], object]] = {
        "save amfm": lambda: save_blocking(trainer, root / "ours", Timings()),
        "save torch": lambda: save_synced(root / "torch.pt", lambda path: torch.save(state, path)),
        "save plain file": lambda: save_synced(root / "plain", flat.tofile),
        "load amfm": load_ours,
        "load torch": lambda: torch.load(root / "torch.pt", weights_only=True),
        "load plain file": (root / "plain").read_bytes,
    }
    times: Times = {name: [] for name in ways}
    for number in range(rounds + 1):
        trainer.step_number += 1
        for name, run in ways.items():
            began, cpu = time.perf_counter(), time.process_time()
            run()
            if number:  # the first one warms up
                times[name].append((time.perf_counter() - began, time.process_time() - cpu))
    return times


def save_synced(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file and wait until the disk has it."""
    write(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def rates_of(times: list[tuple[float, float]], num_bytes: int) -> dict[str, float]:
    """Median GB per second by the clock and per second on processors."""
    clock, cpu = (statistics.median(found) for found in zip(*times))
    return {"clock": num_bytes / 1e9 / clock, "cpu": num_bytes / 1e9 / cpu}


def ratios_of(times: Times, what: str, way: str) -> dict[str, float]:
    """How many times torch's seconds a way takes, the median of the rounds' ratios."""
    pairs = list(zip(times[f"{what} {way}"], times[f"{what} torch"]))
    clock, cpu = (statistics.median(own[kind] / theirs[kind] for own, theirs in pairs) for kind in (0, 1))
    return {"clock_of_torch": clock, "cpu_of_torch": cpu}


if __name__ == "__main__":
    main(checkpoint_rates)
