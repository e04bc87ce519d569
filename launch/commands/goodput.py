"""The table of `amfm plan --failures-per-day`: what failures cost, and how often to save."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amfm.launch.console import print_pairs

if TYPE_CHECKING:
    from amfm.launch.plan.plan import Plan


def print_goodput(made: Plan) -> None:
    """Print what failures cost, part by part, and how often to save; nothing where no number of failures was given."""
    from amfm.launch.plan.failures import goodput
    from amfm.launch.plan.failures.goodput import DAY_SECONDS, FIRST_STEPS_SECONDS, START_SECONDS, Cadence

    found = made.goodput
    if found is None:
        return
    heartbeat, timeout = made.config.launch.heartbeat_seconds, made.config.train.timeout_seconds
    patience = f"train.timeout_seconds={timeout:g}" if heartbeat is None else f"launch.heartbeat_seconds={heartbeat:g}"
    silent = f"{goodput.SILENT_SHARE:.0%} fall silent for {goodput.silent_seconds(made.config):g} s"
    parts = found.recovery
    step = made.own.step.total()

    def describe(cadence: Cadence) -> str:
        every = f"every {cadence.every_steps:,} steps, {cadence.every_steps * step:,.0f} s"
        return f"{cadence.goodput:.1%}, {every}; a failure loses {cadence.lost_seconds:,.0f} s of training"

    days = made.seconds() / DAY_SECONDS
    rows = [
        ("a checkpoint", f"{found.checkpoint_bytes / 1e9:,.0f} GB at {found.storage_bytes_per_second / 1e9:,.0f} GB/s"),
        ("the step waits for its copy", f"{found.stall_seconds:,.2f} s"),
        ("it stands after", f"{found.save_seconds:,.0f} s"),
        ("to notice", f"{parts.notice:,.0f} s, if {silent} and {goodput.HANG_SHARE:.0%} hang until {patience}"),
        ("to start all processes", f"{parts.start:,.0f} s (assumed {START_SECONDS:g})"),
        ("to connect all ranks", f"{parts.connect:,.0f} s (assumed)"),
        ("to verify and load", f"{parts.load:,.0f} s"),
        ("first steps", f"{parts.first_steps:,.0f} s (assumed {FIRST_STEPS_SECONDS:g}, kernels cached)"),
        ("to recover", f"{parts.total():,.0f} s, with a failure every {DAY_SECONDS / found.failures_per_day:,.0f} s"),
    ]
    if found.configured is not None:
        rows.append(("goodput of checkpoints", describe(found.configured)))
    rows.append(("goodput at the best interval", describe(found.best)))
    if found.replicas is not None:
        rows.append(("goodput with replicas", describe(found.replicas)))
    rows.append(("whole run", f"{days / found.expected().goodput:,.1f} days instead of {days:,.1f}"))
    print_pairs(f"Goodput at {found.failures_per_day:g} failures per day", rows)
