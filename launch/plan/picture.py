"""Chart of a plan: memory by part and the step by part for the layouts in question, and the pipeline's timetable.

Which layouts: the configuration's own; with a search also the fastest ones that fit; without one its ZeRO stages. A name
has one colour in the whole chart, and no colour has two names: what memory holds is drawn in blues and purples, arithmetic
in greens and yellows, waiting and communication in reds and greys.

When each pipeline rank computes which micro-batch: the schedules of a run, laid out in time for a drawing.

How it works: each rank acts as its schedule's rules say, and an action begins when its rank is free and what it needs
has been computed elsewhere. Forward passes take a third of a pass, backward passes two; zero_bubble cuts those into a part
that other ranks wait for and one that fills gaps. Sends take no time here, and all pieces are equally long.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from amfm.launch.plan.estimate import Assumptions, Estimate, estimate
from amfm.launch.plan.hardware import GIB
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.plan import Plan
from amfm.launch.plan.search import ZERO_STAGES, is_allowed, with_layout

Kind = Literal["forward", "backward", "weights"]


@dataclass(frozen=True)
class Slot:
    """One action of a rank, in passes of one micro-batch through one rank."""

    rank: int
    piece: int
    kind: Kind
    micro_batch: int
    start: float
    stop: float


@dataclass
class _Rank:
    """What a rank still has to do, in order, as (piece of its own, micro-batch), and when it is free."""

    forward: list[tuple[int, int]]
    backward: list[tuple[int, int]]
    in_flight_limit: int
    is_cut: bool
    weights: list[tuple[int, int]] = field(default_factory=list)
    in_flight: int = 0
    free: float = 0.0


def make_timetable(layout: Layout, num_micro_batches: int) -> list[Slot]:
    """Lay out one step of a pipeline in time, in the order of the starts."""
    ranks, pieces = layout.pipeline, layout.virtual_stages if layout.schedule == "interleaved" else 1
    is_cut = layout.schedule == "zero_bubble"
    lengths: dict[Kind, float] = {"forward": 1 / 3 / pieces, "backward": (1 if is_cut else 2) / 3 / pieces}
    lengths["weights"] = 1 / 3 / pieces
    line = [_begin_rank(rank, ranks, pieces, num_micro_batches, is_cut) for rank in range(ranks)]
    done: dict[tuple[Kind, int, int], float] = {}  # (kind, piece of all, micro-batch) -> when
    slots: list[Slot] = []
    while True:
        choices = [(found, rank) for rank in range(ranks) if (found := _choose(line[rank], rank, ranks, pieces, done))]
        if not choices:
            return slots
        (start, kind, (piece, micro_batch)), rank = min(choices, key=lambda choice: (choice[0][0], choice[1]))
        own, stop = line[rank], start + lengths[kind]
        getattr(own, kind).remove((piece, micro_batch))
        own.free = stop
        own.in_flight += {"forward": 1, "backward": -1, "weights": 0}[kind]
        if kind == "backward" and own.is_cut:
            own.weights.append((piece, micro_batch))
        done[kind, piece * ranks + rank, micro_batch] = stop
        slots.append(Slot(rank, piece, kind, micro_batch, start, stop))


def _begin_rank(rank: int, ranks: int, pieces: int, num_micro_batches: int, is_cut: bool) -> _Rank:
    """A rank before its first action: groups of as many micro-batches as ranks pass one of its pieces after the other."""
    groups = [range(first, min(first + ranks, num_micro_batches)) for first in range(0, num_micro_batches, ranks)]
    forward = [(piece, number) for group in groups for piece in range(pieces) for number in group]
    backward = [(piece, number) for group in groups for piece in reversed(range(pieces)) for number in group]
    limit = ranks - rank if pieces == 1 else 2 * (ranks - rank - 1) + (pieces - 1) * ranks + 1
    return _Rank(forward, backward, limit, is_cut)


def _choose(
    own: _Rank, rank: int, ranks: int, pieces: int, done: dict[tuple[Kind, int, int], float]
) -> tuple[float, Kind, tuple[int, int]] | None:
    """Choose a rank's next action as (start, kind, piece and micro-batch).

    A rank computes forward until as many micro-batches as its limit are in flight, then backward and forward in turns;
    where passes are cut, whatever can start first, backward before forward before weights. None where it is through, or
    where what it waits for has no time yet.
    """
    may_forward = bool(own.forward) and own.in_flight < own.in_flight_limit
    options: list[tuple[float, int, Kind, tuple[int, int]]] = []
    if own.backward and (own.is_cut or not may_forward):
        piece, number = own.backward[0]
        stage = piece * ranks + rank
        is_last = stage == ranks * pieces - 1
        needed = done.get(("forward", stage, number) if is_last else ("backward", stage + 1, number))
        if needed is not None:
            options.append((max(own.free, needed), 0, "backward", own.backward[0]))
    if may_forward:
        piece, number = own.forward[0]
        stage = piece * ranks + rank
        needed = done.get(("forward", stage - 1, number)) if stage else 0.0
        if needed is not None:
            options.append((max(own.free, needed), 1, "forward", own.forward[0]))
    if own.weights:
        options.append((own.free, 2, "weights", own.weights[0]))
    if not options:
        return None
    start, _, kind, action = min(options)
    return start, kind, action


FASTEST_SHOWN = 3
HEIGHT = 0.56  # of a bar, of the room of a layout
MICRO_BATCHES_A_RANK = 3  # of a long step the timetable shows only the beginning
MEMORY_COLOURS = {
    "weights": "#08306b",
    "gathered weights": "#2a5ba8",
    "joined weights": "#4a86c5",
    "master weights": "#6baed6",
    "moments": "#a6cee8",
    "gradients": "#3f007d",
    "gradient share": "#6a51a3",
    "reduction bucket": "#9e9ac8",
    "communication buffers": "#bcbddc",
    "activations": "#00707a",
    "working space": "#2bb3b8",
    "logits": "#94dcd8",
    "graphs": "#d0efee",
    "margin": "#d9d9d9",
}
MORE_MEMORY = ("#c9a3d6", "#7fcdbb", "#54278f", "#1d91c0")
COMPUTE_COLOURS = {
    "mamba": "#1b7837",
    "moe": "#7fbf3f",
    "attention": "#b8860b",
    "head": "#e6c200",
    "feed_forward": "#c7e9b4",
}
MORE_COMPUTE = ("#a6761d", "#4d9221", "#666a00", "#d9c27c", "#00441b", "#bf9b30")
WAIT_COLOURS = {
    "pipeline bubble": "#f2f2f2",
    "gradient reduction, exposed": "#b2182b",
    "weight gathers, exposed": "#f4a582",
    "optimizer and gradient accumulation": "#404040",
    "host, exposed": "#737373",
    "multiprocessors of collectives": "#a6a6a6",
    "waits for the slowest rank": "#d9d9d9",
}
EXCHANGING = "communication, exposed"
EXCHANGE_COLOURS = ("#e31a1c", "#fb6a4a", "#d6604d", "#ff9e80", "#8b0000")
PASS_COLOURS: dict[Kind, str] = {"forward": "#9ecae1", "backward": "#3182bd", "weights": "#fdd0a2"}


def draw_plan(plan: Plan, assumptions: Assumptions, path: Path) -> None:
    """Write the chart to `path`; the suffix chooses the format. The same plan gives the same SVG, with its words as text."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = choose_layouts(plan, assumptions)
    # The fastest layout after a search, else one's own.
    wanted = plan.layouts[0].layout if plan.is_search and plan.layouts else plan.own.layout
    piped = next((pair for pair in shown if pair[1].layout == wanted and wanted.pipeline > 1), None)
    heights = [3.0, 0.9 + 0.55 * len(shown), *([1.1 + 0.32 * wanted.pipeline] if piped else [])]
    figure = Figure(figsize=(12, sum(heights) + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), 1, height_ratios=heights)
    figure.suptitle(
        f"{plan.counts.total / 1e9:,.2f}B parameters on {plan.own.layout.ranks} x {plan.hardware.name}",
        x=0.01,
        ha="left",
    )
    draw_memory(panels[0], plan, shown)
    draw_steps(panels[1], shown)
    if piped is not None:
        draw_pipeline(panels[2], plan, *piped)
    words = {"svg.fonttype": "none", "svg.hashsalt": "plan"}
    with matplotlib.rc_context(words):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def choose_layouts(plan: Plan, assumptions: Assumptions) -> list[tuple[str, Estimate]]:
    """Choose the layouts to draw, with a name each: after a search the fastest and, last, one's own; else by ZeRO stage."""
    own = plan.own.layout
    if plan.is_search:
        fastest = [item for item in plan.layouts if item.layout != own][:FASTEST_SHOWN]
        names = [f"number {place}\n{item.layout.describe()}" for place, item in enumerate(fastest, start=1)]
        mine = [(f"yours\n{own.describe()}", plan.own)] if plan.is_own else []
        return [*mine, *zip(names, fastest)]
    config = plan.stages[0].stage.config
    layouts = [replace(own, zero_stage=stage) for stage in ZERO_STAGES]
    allowed = [layout for layout in layouts if is_allowed(with_layout(config, layout), own.ranks)]
    return [
        (
            f"ZeRO-{layout.zero_stage}{' (yours)' if layout == own else ''}",
            estimate(config, layout, plan.hardware, assumptions),
        )
        for layout in allowed
    ]


def draw_memory(axes: Any, plan: Plan, shown: list[tuple[str, Estimate]]) -> None:
    """Draw memory of the most loaded rank by part, a bar a layout, against the device's memory."""
    parts = dict.fromkeys(name for _, item in shown for name in item.memory.parts)
    names = [*(name for name in MEMORY_COLOURS if _memory_name(name, parts)), *(p for p in parts if _spelt(p) not in MEMORY_COLOURS)]  # fmt: skip
    more = iter(MORE_MEMORY * 4)
    places = range(len(shown))
    bases = [0.0] * len(shown)
    for name in names:
        sizes = [
            sum(size for part, size in item.memory.parts.items() if _spelt(part) == name) / GIB for _, item in shown
        ]
        colour = MEMORY_COLOURS.get(name) or next(more)
        axes.barh(places, sizes, left=bases, color=colour, label=name, height=HEIGHT)
        bases = [base + size for base, size in zip(bases, sizes)]
    limit = plan.hardware.memory_gib
    axes.axvline(limit, color="black", linestyle="--", label=f"{limit:,.0f} GiB of the device")
    for place, total in zip(places, bases):
        colour = "black" if total <= limit else "#b2182b"
        axes.text(total, place, f" {total:,.1f}", va="center", color=colour)
    axes.set_xlim(0, 1.1 * max(*bases, limit))
    axes.set_xlabel("GiB on the most loaded rank")
    _finish(axes, shown, "Memory")


def draw_steps(axes: Any, shown: list[tuple[str, Estimate]]) -> None:
    """Draw where the seconds of a step go, a bar a layout; inside the passes parts of one kind are drawn together."""
    steps = [item.step.parts() for _, item in shown]
    names = list(dict.fromkeys(name for step in steps for name, _ in step))
    computing = [name for name in names if name not in WAIT_COLOURS and not name.endswith(EXCHANGING)]
    exchanging = [name for name in names if name.endswith(EXCHANGING)]
    others = [name for name in computing if name not in COMPUTE_COLOURS]
    colours = (
        WAIT_COLOURS | COMPUTE_COLOURS | dict(zip(others, MORE_COMPUTE * 3)) | dict(zip(exchanging, EXCHANGE_COLOURS))
    )
    bases = [0.0] * len(shown)
    for name in [*computing, *exchanging, *(name for name in WAIT_COLOURS if name in names)]:
        seconds = [dict(step).get(name, 0.0) for step in steps]
        hatch = {"pipeline bubble": "///"}.get(name, "")
        axes.barh(range(len(shown)), seconds, left=bases, color=colours[name], label=name, height=HEIGHT, hatch=hatch, edgecolor="#999999" if hatch else "none", linewidth=0)  # fmt: skip
        bases = [base + part for base, part in zip(bases, seconds)]
    for place, (total, (_, item)) in enumerate(zip(bases, shown)):
        axes.text(
            total, place, f" {total:,.3g} s, MFU {item.mfu:.1%}{'' if item.fits() else ', does not fit'}", va="center"
        )
    axes.set_xlim(0, 1.4 * max(bases))
    axes.set_xlabel("seconds per step, slowest rank")
    _finish(axes, shown, "Where a step's time goes")


def draw_pipeline(axes: Any, plan: Plan, name: str, item: Estimate) -> None:
    """Draw which rank of the pipeline computes which micro-batch when; of a long step the beginning."""
    layout = item.layout
    num_micro_batches = layout.micro_batches(plan.stages[0].stage.config)
    drawn = min(num_micro_batches, MICRO_BATCHES_A_RANK * layout.pipeline)
    step = item.step
    seconds = (sum(step.compute.values()) + sum(step.communication.values())) / num_micro_batches
    slots = make_timetable(layout, drawn)
    names = {"forward": "forward", "backward": "backward", "weights": "gradients of weights"}
    is_cut = any(slot.kind == "weights" for slot in slots)
    for kind, colour in PASS_COLOURS.items():
        own = [slot for slot in slots if slot.kind == kind]
        if own:
            axes.barh(
                [slot.rank for slot in own],
                [seconds * (slot.stop - slot.start) for slot in own],
                left=[seconds * slot.start for slot in own],
                color=colour,
                edgecolor="white",
                linewidth=0.8,
                height=0.9,
                rasterized=True,  # hundreds of bars, which would be most of an SVG
                label="gradients of the inputs" if kind == "backward" and is_cut else names[kind],
            )
    is_numbered = len(slots) <= 160
    if is_numbered:
        for slot in slots:
            colour = "white" if slot.kind == "backward" else "black"
            middle = seconds * (slot.start + slot.stop) / 2
            axes.text(middle, slot.rank, f"{slot.micro_batch + 1}", ha="center", va="center", fontsize=6, color=colour)
    axes.set_yticks(range(layout.pipeline), [f"stage {rank + 1}" for rank in range(layout.pipeline)])
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds; {'numbers are micro-batches, ' if is_numbered else ''}sends take no time here")
    rest = (
        "" if drawn == num_micro_batches else f", as if the step had {drawn} of its {num_micro_batches} micro-batches"
    )
    virtual = f", {layout.virtual_stages} model chunks per rank" if layout.schedule == "interleaved" else ""
    axes.set_title(f"Pipeline of {name.splitlines()[0]}: {layout.schedule}{virtual}{rest}", loc="left", fontsize=10)
    axes.legend(bbox_to_anchor=(1.0, 1.0), loc="upper left", fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _finish(axes: Any, shown: list[tuple[str, Estimate]], title: str) -> None:
    """Name the bars, first on top, and put the legend next to the panel."""
    axes.set_yticks([])
    for place, (name, _) in enumerate(shown):  # above its bar: next to it a long one would take a third of the width
        axes.text(0, place - HEIGHT / 2 - 0.03, " ".join(name.split()), fontsize=7.5, va="bottom")
    axes.set_ylim(len(shown) - 0.6, -0.75)
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(bbox_to_anchor=(1.0, 1.0), loc="upper left", fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _spelt(part: str) -> str:
    """The chart's name of a part of memory; just `communication` would be a name of the step's panel too."""
    return "communication buffers" if part == "communication" else part


def _memory_name(name: str, parts: dict[str, None]) -> bool:
    return name in map(_spelt, parts)
