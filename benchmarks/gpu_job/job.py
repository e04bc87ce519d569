"""The whole job on a GPU: losses vs. a CPU's and of two GPUs vs. one's, a resume with bitwise identical results, memory vs. the plan, speed.

How: every stage starts `amfm train` or a benchmark as a separate process, so that one that fails takes no other along,
and the report is written after each. The CPU's side of a comparison is the same command with the GPU hidden. Rehearsed
on a CPU, both sides are the CPU, which shows the commands and nothing about a GPU.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amfm.kernels.runtime.user_cache import write_whole
from amfm.launch.rank_command import isolated_python, rank_command

# The second configuration has no data of its own here, so it reads the first one's tokens: its vocabulary is cut to theirs.
ON_SHAKESPEARE = (
    "data.store=data/shakespeare",
    "data.tokenizer.vocab_size=2048",
    "data.sources=[{name: shakespeare, paths: [data/corpus/shakespeare]}]",
    "model.vocab_size=2048",
)
CONFIGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "tiny_cpu": ("configs/tiny_cpu.yaml", ()),
    "ladder_150m": ("configs/ladder_150m.yaml", ON_SHAKESPEARE),
}
# Short rows and small batches, which a CPU can follow.
SMALL = ("train.sequence_length=256", "train.micro_batch_size=2", "train.global_batch_size=4")
QUIET = ("run.tensorboard=false", "train.validate_every_steps=null", "train.checkpoint_every_steps=null")
# Largest relative difference of the first step's loss, and of any later one, from a CPU's in float32: only rounding of
# the passes, then what the steps make of it.
LIMITS = {"float32": (1e-4, 2e-2), "bf16": (5e-3, 5e-2)}
STAGE_SECONDS = 1800.0
# What two GPUs of a node exchange: gradients and weights, streams of a pipeline, experts' rows that are counted, and in slots.
SLOTS: tuple[str, ...] = ("model.moe.capacity_factor=1.5",)
PAIRS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "data": ((), ("parallel.zero_stage=2",)),
    "pipeline": ((), ("parallel.pipeline=2",)),
    "experts": ((), ("parallel.expert=2",)),
    "experts in slots": (SLOTS, ("parallel.expert=2",)),
}
FIXED_SEGMENTS = {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}
# What keeps checks of kernels, kernels of Triton, and those of torch.compile, each in a folder.
CACHES = {"XDG_CACHE_HOME": "user", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}


@dataclass
class Job:
    """What stages share: device ("cuda", or "cpu" for a rehearsal), a folder for runs, steps of a comparison."""

    device: str
    folder: Path
    steps: int
    configs: dict[str, tuple[str, tuple[str, ...]]] = field(default_factory=lambda: dict(CONFIGS))

    def train(
        self,
        name: str,
        run: str,
        *overrides: str,
        on_cpu: bool = False,
        num_ranks: int = 1,
        environment: Mapping[str, str] = {},
    ) -> list[dict[str, Any]]:
        """Train a configuration into the job's folder, continuing where it stands; returns a line of metrics a step.

        num_ranks: on as many GPUs of this machine. environment: variables of this run. Raises RuntimeError with the end
        of what the run said if it fails.
        """
        path, own = self.configs[name]
        directory = self.folder / run
        words = ["train", path, f"run.dir={directory}", *own, *QUIET, *overrides, "--nproc", str(num_ranks)]
        run_child(rank_command(words), hides_gpu=on_cpu or self.device == "cpu", variables=environment)
        return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def run_child(command: list[str], *, hides_gpu: bool, variables: Mapping[str, str] = {}) -> str:
    """Run a command to its end and return its standard output. Raises RuntimeError with what it said if it fails."""
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if hides_gpu else {}) | dict(variables)
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=STAGE_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"was stopped after {STAGE_SECONDS:g} s: {' '.join(command)}") from None
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stderr.strip() or done.stdout.strip())[-1500:]}")
    return done.stdout


def run_stages(job: Job, names: list[str], out: Path, *, report: Callable[[str], None]) -> dict[str, Any]:
    """Run stages one after the other, writing the report after each; returns it with `faults`."""
    found: dict[str, Any] = {"device": job.device, "steps": job.steps, "stages": {}}
    for name in names:
        report(f"stage {name}")
        try:
            found["stages"][name] = STAGES[name](job)
        except (RuntimeError, OSError, ValueError) as error:
            found["stages"][name] = {"faults": [str(error)]}
        for fault in found["stages"][name]["faults"]:
            report(f"FAULT in {name}: {fault}")
        write_whole(out, found)
    found["faults"] = [f"{name}: {fault}" for name, stage in found["stages"].items() for fault in stage["faults"]]
    write_whole(out, found)
    return found


def check_stages(names: list[str] | None) -> list[str]:
    """The stages to run, all if none is named. Raises ValueError for an unknown one."""
    for name in names or ():
        if name not in STAGES:
            raise ValueError(f"--stage {name}: there is no such stage; use {', '.join(STAGES)}")
    return names or [*STAGES]


def compare_losses(job: Job) -> dict[str, Any]:
    """Each configuration's losses on the GPU in float32 and bf16, and a CPU's in float32."""
    result: dict[str, Any] = {"losses": {}, "faults": []}
    for name in job.configs:
        sizes = (*SMALL, f"train.steps={job.steps}", *_short_schedule(job.steps))
        cpu = _losses(job.train(name, f"{name}_cpu", *sizes, "train.precision=float32", on_cpu=True))
        result["losses"][name] = {"compared with: cpu float32": cpu}
        for precision, limits in LIMITS.items():
            gpu = _losses(job.train(name, f"{name}_{precision}", *sizes, f"train.precision={precision}"))
            result["losses"][name][f"{job.device} {precision}"] = gpu
            result["faults"] += [f"{name} in {precision}: {fault}" for fault in judge_losses(gpu, cpu, limits)]
    return result


def judge_losses(gpu: list[float], cpu: list[float], limits: tuple[float, float]) -> list[str]:
    """What is wrong with losses, compared with a CPU's or one GPU's: `limits` on the first step's relative difference and on all."""
    if len(gpu) != len(cpu):
        return [f"{len(gpu)} steps instead of {len(cpu)}"]
    differences = [abs(one - other) / abs(other) for one, other in zip(gpu, cpu, strict=True)]
    faults = (
        [] if differences[0] <= limits[0] else [f"the first loss differs by {differences[0]:.2g}, above {limits[0]:g}"]
    )
    # NaN is the worst, and compares with nothing.
    worst = max(range(len(gpu)), key=lambda step: math.inf if math.isnan(differences[step]) else differences[step])
    if not differences[worst] <= limits[1]:
        faults.append(f"the loss of step {worst + 1} differs by {differences[worst]:.2g}, above {limits[1]:g}")
    return faults


def compare_two(job: Job) -> dict[str, Any]:
    """Losses of two GPUs in bf16 vs. those of one, by what the two exchange, and a resume of two, bitwise."""
    if job.device == "cuda":
        import torch

        if torch.cuda.device_count() < 2:
            return {"skipped": f"this machine shows {torch.cuda.device_count()} GPU", "faults": []}
    name = next(iter(job.configs))
    sizes = (*SMALL, f"train.steps={job.steps}", *_short_schedule(job.steps), "train.precision=bf16")
    kinds: tuple[tuple[str, ...], ...] = ((), SLOTS)
    ones = {own: _losses(job.train(name, f"one_{len(own)}", *sizes, *own)) for own in kinds}
    result: dict[str, Any] = {"losses": {"one": ones[()], "one in slots": ones[SLOTS]}, "faults": []}
    for what, (own, layout) in PAIRS.items():
        two = _losses(job.train(name, f"two_{what.replace(' ', '_')}", *sizes, *own, *layout, num_ranks=2))
        result["losses"][what] = two
        result["faults"] += [f"{what}: {fault}" for fault in judge_losses(two, ones[own], LIMITS["bf16"])]
    resumed = compare_resume(job, *PAIRS["data"][1], num_ranks=2)
    return result | {"differing_steps": resumed["differing_steps"], "faults": result["faults"] + resumed["faults"]}


def compare_resume(job: Job, *layout: str, num_ranks: int = 1) -> dict[str, Any]:
    """A run that stops half-way and continues, vs. one that does not: losses and gradient norms, bitwise."""
    name, own = next(iter(job.configs)), f"resume_{num_ranks}"
    sizes = (*SMALL, f"train.steps={job.steps}", *_short_schedule(job.steps), "train.deterministic=true", *layout)
    whole = job.train(name, f"{own}_whole", *sizes, num_ranks=num_ranks)
    half = f"train.stop_after_steps={max(1, job.steps // 2)}"
    job.train(name, f"{own}_parts", *sizes, half, num_ranks=num_ranks)
    parts = job.train(name, f"{own}_parts", *sizes, num_ranks=num_ranks)
    differing = [
        one["step"] for one, other in zip(whole, parts, strict=True)
        if (one["loss"], one["grad_norm"]) != (other["loss"], other["grad_norm"])
    ]  # fmt: skip
    faults = [f"other bits after a resume, first at step {differing[0]}"] if differing else []
    return {"steps": len(whole), "differing_steps": differing, "faults": faults}


def compare_memory(job: Job) -> dict[str, Any]:
    """The peak of a step vs. what the plan predicts, for each configuration as it trains.

    On a GPU also what its allocator has reserved, with segments that grow (what `amfm` asks for) and of fixed sizes.
    """
    result: dict[str, Any] = {"memory": {}, "faults": []}
    for name, (path, own) in job.configs.items():
        settings = (*_one_rank(job), "train.steps=3", *_short_schedule(3))
        words = ["plan", path, *own, *settings, "--gpus", "1", "--margin", "0", "--json"]
        planned = json.loads(run_child(rank_command(words), hides_gpu=True))
        lines = job.train(name, f"{name}_memory", *settings)
        fixed = job.train(name, f"{name}_memory_fixed", *settings, environment=FIXED_SEGMENTS)
        result["memory"][name] = {
            "predicted_bytes": planned["memory"]["total_bytes"],
            "measured_bytes": lines[-1]["memory_bytes"],
            "allocator": lines[-1].get("allocator"),
            "allocator_fixed_segments": fixed[-1].get("allocator"),
        }
    return result


def time_first_start(job: Job) -> dict[str, Any]:
    """Seconds of a start and one step with empty caches, where kernels are checked and compiled, and again with filled ones."""
    result: dict[str, Any] = {"first_start": {}, "faults": []}
    for name in job.configs:
        caches = job.folder / f"{name}_caches"
        environment = {variable: str(caches / folder) for variable, folder in CACHES.items()}
        seconds = {}
        for run in ("empty", "filled"):
            began = time.perf_counter()
            settings = (*_one_rank(job), "train.steps=2", "train.stop_after_steps=1", *_short_schedule(2))
            job.train(name, f"{name}_{run}", *settings, environment=environment)
            seconds[f"{run}_seconds"] = time.perf_counter() - began
        result["first_start"][name] = seconds
    return result


def measure_speed(job: Job) -> dict[str, Any]:
    """Tokens per second of each configuration as it trains, the median of steps after the first three."""
    result: dict[str, Any] = {"speed": {}, "faults": []}
    for name in job.configs:
        steps = max(6, job.steps)
        lines = job.train(name, f"{name}_speed", *_one_rank(job), f"train.steps={steps}", *_short_schedule(steps))
        speeds = [line["tokens_per_second"] for line in lines[3:]]
        result["speed"][name] = {"tokens_per_second": statistics.median(speeds), "mfu": lines[-1].get("mfu")}
    return result


def profile(job: Job) -> dict[str, Any]:
    """Where the time of a step goes, by kernel: the longest of the last configuration's."""
    path, own = list(job.configs.values())[-1]
    directory = job.folder / "profile"
    words = [path, f"run.dir={directory}", *own, *QUIET, *_one_rank(job), "train.steps=6", *_short_schedule(6)]
    command = [*isolated_python(), "-m", "benchmarks.gpu_job.profile", *words]
    found = run_child(
        command, hides_gpu=job.device == "cpu", variables={"PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    )
    return {"kernels": json.loads(found), "faults": []}


STAGES: dict[str, Callable[[Job], dict[str, Any]]] = {
    "losses": compare_losses,
    "resume": compare_resume,
    "two_gpus": compare_two,
    "first_start": time_first_start,
    "memory": compare_memory,
    "speed": measure_speed,
    "profile": profile,
}


def _one_rank(job: Job) -> tuple[str, ...]:
    """A batch of four micro-batches as they are configured; small ones where a CPU rehearses."""
    return SMALL if job.device == "cpu" else ("train.global_batch_size=16", "train.micro_batch_size=4")


def _short_schedule(steps: int) -> tuple[str, ...]:
    """A schedule that fits so few steps."""
    return ("schedule.warmup_steps=1", f"schedule.decay_steps={max(1, steps // 2)}")


def _losses(lines: list[dict[str, Any]]) -> list[float]:
    """The loss of each step."""
    return [line["loss"] for line in lines]
