"""Compares two finished runs: what they logged of each step, and every number of their last checkpoints."""

from __future__ import annotations

from pathlib import Path

from amfm.pretrain.checkpoint.inspect import diff_checkpoints
from amfm.pretrain.checkpoint.manifest_file import checkpoint_name
from tests.soak.settings import STEPS
from tests.soak.start import read_log

COMPARED = ("loss", "grad_norm", "lr", "tokens", "auxiliary", "data", "skipped")


def is_finished(run_dir: Path) -> bool:
    """Whether a run's last event says that all steps are done."""
    events = read_log(run_dir / "events.jsonl")
    return bool(events) and events[-1].get("reason") == "finished"


def compare(straight: Path, hurt: Path, steps: int = STEPS) -> list[str]:
    """Compare two finished runs, and return where they differ, in words; empty for equality bitwise."""
    last = f"checkpoints/{checkpoint_name(steps)}"
    difference = diff_checkpoints(straight / last, hurt / last)
    kinds = ("only_in_first", "only_in_second", "tensors", "state", "optimizer_steps")
    return [*compare_logs(straight, hurt), *(f"last checkpoint: {kind} differ" for kind in kinds if difference[kind])]


def compare_logs(straight: Path, hurt: Path) -> list[str]:
    """Compare what two runs logged of their steps, and return the first difference, in words."""
    first, second = (
        {line["step"]: {key: line[key] for key in COMPARED} for line in read_log(run_dir / "metrics.jsonl")}
        for run_dir in (straight, hurt)
    )
    steps = sorted(step for step in first.keys() | second.keys() if first.get(step) != second.get(step))
    return [f"step {step}: {first.get(step)} undisturbed, {second.get(step)} under faults" for step in steps[:1]]
