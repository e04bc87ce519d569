"""Peak memory of real training steps in a layout, compared with the plan's estimate: the table of docs/benchmarks/planning.md.

`python -m tests.launch.plan.real_memory` prints the table. On GPUs `python -m benchmarks.gpu_job` does it for the job it trains.

How it works: a rank's peak is the rise of its resident memory (of its allocated memory on a CUDA GPU) from before the
model is built. A narrow model trains first, so that lazily loaded libraries and connections do not count. Caches that
CPU libraries keep next to tensors are switched off (`WITHOUT_CACHES`). Loader, log and checkpoints of a run are left
out: the plan counts none of them.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from amfm.launch.cluster.local import run_command
from amfm.launch.console import print_rows, say
from amfm.launch.plan.activations import storage_of
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.memory import estimate_memory
from amfm.pretrain.checks.load import load_checked
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.monitor.environment import read_processor_name
from amfm.pretrain.parallel import Parallel
from benchmarks.small_steps import begin_ranks, build_for_steps, take_step

ROOT = Path(__file__).parents[3]
STEPS = 2  # the first allocates moments, the second has them during its passes
STATUS, PEAK_RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# What libraries of a CPU run keep next to the tensors: glibc freed blocks for later (with these, of 64 KiB and more
# none), oneDNN and PyTorch the bf16 products that they prepared, with weights in another order.
WITHOUT_CACHES = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
    "LRU_CACHE_CAPACITY": "1",
}
# The table of docs/benchmarks/planning.md: preset, ranks, settings. Sequences of 512 tokens, 2 sequences per micro-batch, 4 a
# rank.
ROWS = ("train.sequence_length=512", "train.micro_batch_size=2", "train.num_threads=1", "kernels.backend=torch")
FLOAT32 = "train.precision=float32"
CASES: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("ladder_20m", 1, (FLOAT32, "parallel.zero_stage=0")),
    ("ladder_20m", 1, (FLOAT32, "parallel.zero_stage=1")),
    ("ladder_20m", 1, ("train.precision=bf16", "parallel.zero_stage=1")),
    ("ladder_20m", 1, (FLOAT32, "parallel.zero_stage=1", "train.recompute=full")),
    ("ladder_20m", 1, (FLOAT32, "parallel.zero_stage=3")),
    ("ladder_20m", 2, (FLOAT32, "parallel.zero_stage=2")),
    ("ladder_20m", 2, (FLOAT32, "parallel.zero_stage=3")),
    ("ladder_20m", 2, ("train.precision=bf16", "parallel.zero_stage=3")),
    ("ladder_20m", 2, (FLOAT32, "parallel.tensor=2")),
    ("ladder_20m", 2, (FLOAT32, "parallel.tensor=2", "parallel.sequence_parallel=true")),
    ("ladder_20m", 2, (FLOAT32, "parallel.expert=2")),
    ("ladder_20m", 2, (FLOAT32, "parallel.context=2")),
    ("ladder_20m", 2, (FLOAT32, "parallel.pipeline=2")),
    ("ladder_20m", 4, (FLOAT32, "parallel.tensor=2", "parallel.pipeline=2")),
    ("ladder_150m", 1, ("train.precision=bf16", "parallel.zero_stage=1")),
    ("ladder_150m", 2, (FLOAT32, "parallel.zero_stage=3")),
    ("ladder_150m", 2, (FLOAT32, "parallel.tensor=2", "parallel.sequence_parallel=true")),
    ("ladder_150m", 2, (FLOAT32, "parallel.expert=2")),
)


def bench_memory(config: RunConfig) -> dict[str, Any]:
    """Train two steps and return predicted bytes, measured bytes of the most loaded rank, and the error of the prediction.

    Every rank must call this; all get the same. Raises RuntimeError if the system does not tell a process its peak.
    """
    parallel = begin_ranks(config)
    gauge = Gauge(parallel.device)
    _warm_up(config, parallel)
    # After the warm-up, so that only this configuration's own allocations count.
    gauge.start()
    _train(config, parallel)
    measured = parallel.gather_objects(gauge.rise())
    layout = Layout.of(config, parallel.world_size)
    memory = estimate_memory(config, layout, storage_of(config, on_gpu=parallel.device.type == "cuda"), margin=0.0)
    return {
        "ranks": parallel.world_size,
        "precision": config.train.precision,
        "layout": layout.describe(),
        "recompute": config.train.recompute,
        "predicted_bytes": round(memory.total()),
        "measured_bytes": max(measured),
        "measured_bytes_by_rank": measured,
        "error": memory.total() / max(measured) - 1,
        "fullest_in": memory.phase,
        "by_part": {name: round(size) for name, size in memory.parts.items()},
        "hardware": read_processor_name() if parallel.device.type == "cpu" else torch.cuda.get_device_name(),
    }


class Gauge:
    """Meter of this process's peak memory: resident on a CPU, PyTorch's allocator on a GPU.

    Raises RuntimeError if the system does not let a process reset its peak.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_cuda, self.before = device.type == "cuda", 0
        if not self.on_cuda and not os.access(PEAK_RESET, os.W_OK):
            raise RuntimeError(f"{PEAK_RESET} cannot be written, so peaks of memory stay unknown; use Linux")

    def start(self) -> None:
        """Reset the peak and count from here."""
        gc.collect()
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            PEAK_RESET.write_text("5", encoding="utf-8")  # proc(5): resets the peak of resident memory
            self.before = _status_bytes("VmRSS")

    def rise(self) -> int:
        """Peak bytes since `start` beyond what was held then."""
        return (torch.cuda.max_memory_allocated() if self.on_cuda else _status_bytes("VmHWM")) - self.before


def _status_bytes(name: str) -> int:
    line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _train(config: RunConfig, parallel: Parallel) -> None:
    """Build the run's engine and take `STEPS` steps; all of it is freed on return."""
    engine, pipeline = build_for_steps(config, parallel)
    for _ in range(STEPS):
        take_step(config, parallel, engine, pipeline)


def _warm_up(config: RunConfig, parallel: Parallel) -> None:
    """Take the same steps with a narrow model, which loads lazy libraries and opens all connections."""
    model = config.model.model_copy(update={"hidden_size": 64, "vocab_size": 512})
    train = config.train.model_copy(update={"sequence_length": 64})
    _train(config.model_copy(update={"model": model, "train": train}), parallel)


def start_ranks(
    path: Path, ranks: int, settings: Sequence[str], environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Measure a configuration in its own ranks; rank 0 prints one object."""
    command = [sys.executable, "-m", "tests.launch.plan.real_memory", str(path), str(ranks), *settings]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)


def measure_cases(presets: Path, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Measure each of `CASES` in separate processes, one after the other.

    `presets` is the folder of the ladder's files. Raises RuntimeError with the words of a case that failed.
    """
    rows = []
    for number, (preset, ranks, overrides) in enumerate(CASES, start=1):
        settings = [*ROWS, f"train.global_batch_size={4 * ranks}", *overrides]
        report(f"{number} of {len(CASES)}: {preset} on {ranks} rank(s), {' '.join(overrides)}")
        done = start_ranks(presets / f"{preset}.yaml", ranks, settings)
        if done.returncode:
            raise RuntimeError(f"{preset} on {ranks} rank(s) with {' '.join(overrides)} failed: {done.stderr[-2000:]}")
        row = json.loads(done.stdout)
        rows.append({"preset": preset, **row})
        report(f"predicted {row['predicted_bytes'] / 1e6:,.0f} MB, measured {row['measured_bytes'] / 1e6:,.0f} MB")
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the rows of `measure_cases` with the hardware below."""
    lines = [
        (
            row["preset"],
            row["precision"],
            row["ranks"],
            row["layout"] + (f" recompute={row['recompute']}" if row["recompute"] != "none" else ""),
            row["fullest_in"],
            f"{row['predicted_bytes'] / 1e6:,.0f}",
            f"{row['measured_bytes'] / 1e6:,.0f}",
            f"{row['error']:+.1%}",
        )
        for row in rows
    ]
    columns = ("model", "precision", "ranks", "layout", "most loaded in", "predicted MB", "measured MB", "error")
    print_rows("Peak memory of the most loaded rank", columns, lines)
    say(rows[0]["hardware"])


def main(arguments: Sequence[str]) -> int:
    """Print the table; with CONFIG.yaml RANKS KEY=VALUE ... measure only that one, as launcher or as one of its ranks."""
    if not arguments:
        print_table(measure_cases(ROOT / "configs", report=say))
        return 0
    path, ranks, *settings = arguments
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "tests.launch.plan.real_memory", *arguments]
        return run_command(command, int(ranks), WITHOUT_CACHES)
    result = bench_memory(load_checked(path, settings, world_size=int(ranks)))
    if os.environ["RANK"] == "0":
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
