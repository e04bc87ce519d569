"""Tables of a plan: its layouts, those that a search left out, and its training stages.

The table of `amfm plan --failures-per-day`: what failures cost, and how often to save.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from amfm.launch.console import print_pairs, print_rows, say

if TYPE_CHECKING:
    from amfm.launch.plan.estimate import Estimate
    from amfm.launch.plan.plan import Plan


def show_seconds(seconds: float) -> str:
    """Format the time of a part of a step, in milliseconds below a second."""
    return f"{seconds:,.3f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def print_verdict(made: Plan, *, is_written: bool) -> None:
    """Print first what one asks first: whether it fits, how fast and how long it is, and which layout is faster."""
    from amfm.launch.plan.hardware import GIB
    from amfm.pretrain.report.numbers import count, duration

    own, room = made.own, made.hardware.memory_gib
    fits = all(entry.estimate.fits() for entry in made.stages)
    hours = made.seconds() / 3600 * own.layout.ranks
    spent = f"{count(hours)} GPU-hours" if hours >= 1 else "less than a GPU-hour"
    rows = [
        ("fits" if fits else "does not fit", f"{own.memory.total() / GIB:,.1f} of {room:,.1f} GiB"),
        ("a step", f"{show_seconds(own.step.total())}, {own.mfu:.1%} MFU, predicted"),
        ("whole run", f"{count(made.tokens)} tokens, {duration(made.seconds())}, {spent}"),
    ]
    best = made.layouts[0] if made.layouts else None
    if made.is_search and best is not None and best.layout != own.layout:
        gain = f" ({100 * (best.step.total() / own.step.total() - 1):+.1f}%)" if fits else ""
        what = f"{show_seconds(best.step.total())} a step{gain}, {best.memory.total() / GIB:,.1f} GiB"
        rows.append(("faster" if fits else "fits instead", f"{best.layout.describe()}: {what}"))
        if not is_written:
            rows.append(("to use it", "the same command with --write-layout"))
    print_pairs(f"{own.layout.ranks} x {made.hardware.name}", rows)


def print_goodput(made: Plan) -> None:
    """Print what failures cost, part by part, and how often to save; nothing if no number of failures was given."""
    from amfm.launch.plan.failures import goodput
    from amfm.launch.plan.failures.goodput import DAY_SECONDS, FIRST_STEPS_SECONDS, START_SECONDS, Cadence
    from amfm.pretrain.report.numbers import duration

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
    rows.append(
        ("whole run", f"{duration(made.seconds() / found.expected().goodput)} instead of {duration(made.seconds())}")
    )
    print_pairs(f"Goodput at {found.failures_per_day:g} failures per day", rows)


SHOWN_LAYOUTS = 8
LONGEST_SHOWN = 3


def print_layouts(made: Plan) -> None:
    """Print the fastest layouts that fit, then the nearest misses with the reason; what all share is said once."""
    from amfm.launch.plan.hardware import GIB

    shown = [*made.layouts[:SHOWN_LAYOUTS], *made.near_misses]
    words = [item.layout.describe().split() for item in shown]
    shared = [word for word in words[0] if all(word in others for others in words)] if len(words) > 1 else []
    rows = [
        (
            " ".join(word for word in own if word not in shared) or "nothing else",
            f"{item.memory.total() / GIB:,.1f}",
            show_seconds(item.step.total()),
            f"{item.mfu:.1%}" if item.fits() else "",
            describe_longest(item) if item.fits() else item.reason,
        )
        for item, own in zip(shown, words)
    ]
    what = f"Layouts, fastest first; then near misses{'. All have ' + ' '.join(shared) if shared else ''}"
    print_rows(what, ("layout", "GiB", "a step", "MFU", "bottleneck, or why it does not fit"), rows)


def print_left_out(made: Plan, *, whole: bool) -> None:
    """Print why a search has no other layouts, counted, and what it does not try; in one line unless the whole is asked for."""
    if not made.left_out:
        return
    if not whole:
        number = sum(entry.count or 0 for entry in made.left_out)
        say(f"amfm: {number:,} layouts were left out; --why lists the reasons")
        return
    rows = [("" if entry.count is None else f"{entry.count:,}", entry.what, entry.example) for entry in made.left_out]
    columns = ("layouts", "why not", "one of them; for what was not tried, the reason")
    print_rows("Left out of the search", columns, rows)


def describe_longest(item: Estimate) -> str:
    """Name the LONGEST_SHOWN longest parts of a step with their shares."""
    longest = sorted(item.step.parts(), key=lambda part: -part[1])[:LONGEST_SHOWN]
    return ", ".join(f"{name} {seconds / item.step.total():.0%}" for name, seconds in longest)


def print_stages(made: Plan) -> None:
    """Print tokens, steps, memory and time of each training stage."""
    from amfm.launch.plan.hardware import GIB
    from amfm.pretrain.report.numbers import count, duration

    rows = [
        (
            entry.stage.name,
            count(entry.stage.num_tokens()),
            f"{entry.stage.num_steps:,}",
            f"{entry.stage.train.global_batch_size} x {entry.stage.train.sequence_length}",
            f"{entry.estimate.memory.total() / GIB:,.1f}",
            show_seconds(entry.estimate.step.total()),
            f"{entry.estimate.mfu:.1%}",
            duration(entry.seconds()),
            entry.estimate.reason or "fits",
        )
        for entry in made.stages
    ]
    print_rows("Stages", ("stage", "tokens", "steps", "rows", "GiB", "a step", "MFU", "time", ""), rows)


def print_chosen(made: Plan) -> None:
    """Print the layout that a search chose for each training stage; nothing without a search."""
    from amfm.launch.plan.hardware import GIB
    from amfm.pretrain.report.numbers import duration

    rows = [
        (
            entry.stage.name,
            entry.chosen.layout.describe(),
            f"{entry.chosen.memory.total() / GIB:,.1f}",
            show_seconds(entry.chosen.step.total()),
            f"{entry.chosen.mfu:.1%}",
            duration(entry.stage.num_steps * entry.chosen.step.total()),
        )
        for entry in made.stages
        if entry.chosen is not None
    ]
    if rows:
        print_rows("Each stage in its own layout", ("stage", "layout", "GiB", "a step", "MFU", "time"), rows)
