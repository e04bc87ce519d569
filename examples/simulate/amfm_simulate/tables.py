"""Tables of `amfm plan --trace`: planned vs. traced memory, FLOPs, bytes and launches of a rank."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from amfm.launch.console import print_pairs, print_rows, say

if TYPE_CHECKING:
    from amfm.launch.plan.time import StepTime
    from amfm_simulate.timeline import Timeline
    from amfm_simulate.trace import TracedRank

SHOWN_LINES = 12


def print_trace(entry: TracedRank) -> None:
    """Print all tables of one rank, host waits and wrong fake functions included."""
    place = f"rank {entry.rank} of {entry.layout.ranks}, stage {entry.stage}"
    print_memory(entry, place)
    print_flops(entry, place)
    print_bytes(entry, place)
    print_launches(entry, place)
    waits = entry.traced["host_waits"]
    rows = [(line, f"{count:,}") for line, count in waits.items()]
    print_rows(f"Host waits for the GPU per step: {sum(waits.values()):,}", ("line", "times"), rows)
    print_capture(entry, place)
    compiled = entry.traced["compiled"]
    say(f"kernels compiled before the first step: {compiled['first']}; in the steps: {len(compiled['late'])}")
    for kernel in compiled["late"]:
        say(f"amfm: compiled in a step: {kernel}")
    for name, difference in entry.traced["mismatches"].items():
        say(f"amfm: the fake function of {name} is wrong: {difference}")


def print_memory(entry: TracedRank, place: str) -> None:
    """Print planned parts, traced phases, and the lines that hold the most at the peak."""
    from amfm.launch.plan.hardware import GIB

    traced, predicted = entry.traced, entry.predicted
    pairs = [
        ("parameters held", f"{traced['parameters']:,} of {entry.held_parameters():,.0f} planned"),
        ("before the first step", f"{traced['held_bytes'] / GIB:,.3f} GiB"),
    ]
    pairs += [(f"traced, {phase}", f"{size / GIB:,.3f} GiB") for phase, size in traced["phases"].items()]
    pairs += [(f"planned, {name}", f"{size / GIB:,.3f} GiB") for name, size in predicted.parts.items()]
    pairs.append(
        (
            "peak per step",
            f"{predicted.total() / GIB:,.3f} GiB planned ({predicted.phase}), {entry.peak_bytes / GIB:,.3f} GiB traced "
            f"({traced['peak_phase']}), {entry.error():+.1%}",
        )
    )
    print_pairs(f"Memory of {place}, {traced['micro_batches']} micro-batches: {entry.layout.describe()}", pairs)
    lines = list(traced["by_line"].items())
    rows = [(f"{size / GIB:,.3f}", line) for line, size in lines[:SHOWN_LINES]]
    rest = sum(size for _, size in lines[SHOWN_LINES:])
    rows.append((f"{rest / GIB:,.3f}", f"{len(lines[SHOWN_LINES:])} more lines"))
    print_rows("At the peak, by the line that allocated", ("GiB", "line"), rows)


def print_flops(entry: TracedRank, place: str) -> None:
    """Print FLOPs by kind of block, planned as MFU counts them and traced."""
    from amfm_simulate.trace import predicted_flops, traced_flops

    planned, traced = predicted_flops(entry), traced_flops(entry)
    rows = []
    for kind in dict.fromkeys([*planned, *traced]):
        both = planned.get(kind, 0.0), traced.get(kind, 0.0)
        ratio = f"{both[1] / both[0] - 1:+.1%}" if both[0] else ""
        rows.append((kind, f"{both[0]:.4g}", f"{both[1]:.4g}", ratio))
    print_rows(f"FLOPs per step, {place}", ("kind", "planned (as for MFU)", "traced", ""), rows)


def print_bytes(entry: TracedRank, place: str) -> None:
    """Print bytes handed to collectives, by axis and collective; the planned ones are a mean over its pipeline stage."""
    from amfm_simulate.trace import predicted_bytes, traced_bytes

    planned, traced = predicted_bytes(entry), traced_bytes(entry)
    if isinstance(planned, str):
        say(f"amfm: no formula for the bytes of this layout: {planned}")
        planned = {}
    rows = []
    for axis, collective in sorted(planned.keys() | traced.keys()):
        found = traced.get((axis, collective), {"passes": 0, "once a step": 0})
        formula = f"{planned[axis, collective]:,.0f}" if (axis, collective) in planned else ""
        rows.append((axis, collective, formula, f"{found['passes']:,}", f"{found['once a step']:,}"))
    columns = ("axis", "collective", "formula, mean of its stage", "traced, passes", "traced, once per step")
    print_rows(f"Bytes handed to collectives per step, {place}", columns, rows)


def print_launches(entry: TracedRank, place: str) -> None:
    """Print kernel launches by kind of block, in a step and in each pass through a block."""
    from amfm_simulate.trace import kind_of, launches_a_block

    launches = entry.traced["launches"]
    each = {which: launches_a_block(entry.traced, which) for which in ("forward", "backward")}
    rows = []
    for letter in dict.fromkeys([*launches["triton"], *launches["other"]]):
        both = launches["triton"].get(letter, 0), launches["other"].get(letter, 0)
        kind = kind_of(letter)
        shares = (f"{found[kind]:,.1f}" if kind in found else "" for found in each.values())
        rows.append((kind, f"{both[0]:,}", f"{both[1]:,}", *shares))
    sums = Counter(triton=sum(launches["triton"].values()), other=sum(launches["other"].values()))
    rows.append(("all", f"{sums['triton']:,}", f"{sums['other']:,}", "", ""))
    columns = ("kind", "Triton kernels", "others", "per block, forward", "per block, backward")
    print_rows(f"Kernel launches per step, {place}", columns, rows)


def print_capture(entry: TracedRank, place: str) -> None:
    """Print which kinds of block a CUDA graph could hold, and what keeps it from the others."""
    from amfm_simulate.trace import kind_of

    rows = []
    for letter, passes in entry.traced["capture"].items():
        for which, found in passes.items():
            if letter != "step":
                why = [*(f"host reads: {line}" for line in found["host_reads"]), *found["changed"]]
                rows.append(
                    (kind_of(letter), which, f"{found['launches']:,}", "; ".join(why[:2]) or "could be captured")
                )
    columns = ("kind", "pass", "launches", "CUDA graph")
    print_rows(f"Launches of two steps with other documents, {place}", columns, rows)


def print_seconds(line: Timeline, planned: StepTime) -> None:
    """Print the seconds of the traced micro-batches by part: as planned, and as the timeline has them."""
    from amfm_simulate.timeline import compare_seconds

    entry = line.entry
    found = compare_seconds(line, planned)
    rows = [
        (name, f"{said:,.4f}", f"{laid_out:,.4f}", f"{laid_out - said:+,.4f}")
        for name, (said, laid_out) in found.items()
    ]
    place = f"rank {entry.rank} of {entry.layout.ranks}, {entry.traced['micro_batches']} micro-batches"
    print_rows(f"Seconds per step, {place}", ("part", "planned", "timeline", "difference"), rows)
    say(
        "For the time of a step, use the planned column: the timeline shows what overlaps, but host, launches and slow "
        "ranks take no time in it."
    )
