"""`python -m benchmarks.gpu_job`: the whole job on a GPU, stage by stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_rows, say
from benchmarks.command import main
from benchmarks.gpu_job.job import Job, check_stages, run_stages


def gpu_job(
    *,
    stage: Annotated[
        list[str] | None,
        typer.Option(
            help="Run only this stage: losses, resume, two_gpus, first_start, memory, speed or profile; repeatable."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps per comparison.")] = 10,
    device: Annotated[
        str, typer.Option(help="cuda, or cpu for a rehearsal that compares the CPU with itself.")
    ] = "cuda",
    folder: Annotated[
        Path, typer.Option(help="Output folder for runs and report; must not contain older runs.")
    ] = Path("runs/gpu_job"),
    as_json: JsonOption = False,
) -> None:
    """Train tiny_cpu and ladder_150m on a GPU and check losses against a CPU, two GPUs, resuming, memory, speed, profile."""
    names = check_stages(stage)
    if device not in ("cuda", "cpu"):
        raise ValueError(f"--device {device}: use cuda, or cpu for a rehearsal")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no GPU that answers; rehearse with --device cpu")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"--folder {folder} is not empty: runs would continue from its files; name another, or remove it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    result = run_stages(Job(device, folder, steps), names, folder / "report.json", report=say)
    if as_json:
        print_json(result)
    else:
        print_job(result)
        say(f"wrote {folder / 'report.json'}")
    if result["faults"]:
        raise RuntimeError(f"verification failed on {device}: {'; '.join(result['faults'])}")


def describe_reserved(allocator: dict[str, int] | None) -> str:
    """What an allocator has reserved, in GiB, with its retries; nothing on a CPU, which has none."""
    if allocator is None:
        return ""
    retries = f", {allocator['alloc_retries']} retries" if allocator["alloc_retries"] else ""
    return f"{allocator['reserved_bytes'] / 2**30:.3f}{retries}"


def print_job(result: dict[str, Any]) -> None:
    """Print what each stage found: losses side by side, memory, speed, and the ten longest operations."""
    stages = result["stages"]
    for name, losses in stages.get("losses", {}).get("losses", {}).items():
        rows = [(str(step + 1), *(f"{loss:.6f}" for loss in row)) for step, row in enumerate(zip(*losses.values()))]
        print_rows(f"Losses of {name}", ("step", *losses), rows)
    if "differing_steps" in stages.get("resume", {}):
        say(f"resume: {stages['resume']['steps']} steps, {len(stages['resume']['differing_steps'])} with other bits")
    two = stages.get("two_gpus", {})
    if "skipped" in two:
        say(f"two_gpus: not run, {two['skipped']}")
    elif "losses" in two:
        rows = [
            (str(step + 1), *(f"{loss:.6f}" for loss in row)) for step, row in enumerate(zip(*two["losses"].values()))
        ]
        print_rows("Losses of two GPUs and of one, bf16", ("step", *two["losses"]), rows)
        say(f"two_gpus: resumed, {len(two['differing_steps'])} steps with other bits")
    starts = [
        (name, f"{found['empty_seconds']:.0f}", f"{found['filled_seconds']:.0f}")
        for name, found in stages.get("first_start", {}).get("first_start", {}).items()
    ]
    if starts:
        print_rows("Start and one step, seconds", ("configuration", "empty caches", "filled caches"), starts)
    memory = [
        (
            name,
            f"{found['predicted_bytes'] / 2**30:.3f}",
            f"{found['measured_bytes'] / 2**30:.3f}",
            *(describe_reserved(found[key]) for key in ("allocator", "allocator_fixed_segments")),
        )
        for name, found in stages.get("memory", {}).get("memory", {}).items()
    ]
    if memory:
        columns = ("configuration", "planned", "measured", "reserved", "reserved, fixed segments")
        print_rows("Peak of a step, GiB", columns, memory)
    speed = [
        (name, f"{found['tokens_per_second']:,.0f}", f"{found['mfu']:.1%}" if found["mfu"] is not None else "")
        for name, found in stages.get("speed", {}).get("speed", {}).items()
    ]
    if speed:
        print_rows("Speed", ("configuration", "tokens per second", "MFU"), speed)
    longest = stages.get("profile", {}).get("kernels", [])[:10]
    if longest:
        rows = [(row["name"][:70], str(row["calls"]), f"{row['milliseconds']:.1f}") for row in longest]
        print_rows("Longest operations of six steps", ("operation", "calls", "ms"), rows)


if __name__ == "__main__":
    main(gpu_job)
