"""Runs of one way over seeds, as a curve, a line of the table and of the picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amfm.data_pipeline.durable.files import replacing
from benchmarks.speedrun.ways import WAYS

COLUMNS = (
    "way",
    "active M",
    "precision",
    "rate",
    "steps",
    "bits per byte",
    "least to most",
    "seconds to the best peer's",
)
COLORS = {"amfm": "#0072b2", "llama": "#d55e00", "nemotron_h": "#009e73"}  # Wong 2011, Nature Methods 8, 441


@dataclass(frozen=True)
class Curve:
    """Mean bits per byte over seeds: `points` of seconds and bits, `ends` of each seed, steps and tokens of the first."""

    name: str
    what: str
    rate: float
    active: int
    precision: str
    steps: int
    tokens: int
    points: list[tuple[float, float]]
    ends: list[float]

    @classmethod
    def of(cls, name: str, rate: float, runs: Sequence[dict[str, Any]]) -> Curve:
        """From the results of runs that differ in their seed."""
        places = list(zip(*(run["points"] for run in runs)))
        points = [
            (statistics.mean(seconds for seconds, _ in place), statistics.mean(bits for _, bits in place))
            for place in places
        ]
        first = runs[0]
        return cls(
            name=name,
            what=WAYS[name].what,
            rate=rate,
            active=first["active"],
            precision=first["precision"],
            steps=first["steps"],
            tokens=first["tokens"],
            points=points,
            ends=[run["points"][-1][1] for run in runs],
        )

    @property
    def end(self) -> float:
        """Mean over the seeds."""
        return statistics.mean(self.ends)

    def seconds_to(self, bits: float) -> float | None:
        """When the mean comes to so few bits per byte, on a line between points; None if it does not."""
        for (before, high), (after, low) in zip(self.points, self.points[1:]):
            if low <= bits:
                return before + (after - before) * min(1.0, (high - bits) / (high - low))
        return None


def summarize(curves: Sequence[Curve]) -> list[tuple[str, ...]]:
    """Lines of the table, in the order of `COLUMNS`."""
    peers = [curve for curve in curves if WAYS[curve.name].kind != "amfm"]
    best = min((curve.end for curve in peers), default=None)
    rows: list[tuple[str, ...]] = []
    for curve in curves:
        reached = None if best is None else curve.seconds_to(best)
        rows.append(
            (
                curve.what,
                f"{curve.active / 1e6:.2f}",
                curve.precision,
                f"{curve.rate:g}",
                f"{curve.steps:,}",
                f"{curve.end:.3f}",
                f"{min(curve.ends):.3f} to {max(curve.ends):.3f}",
                "" if reached is None else f"{reached:.0f}",
            )
        )
    return rows


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Write a picture: bits per byte by processor seconds, a line per way with a dot for each seed's end."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"font.size": 9, "axes.grid": True, "grid.color": "#dddddd", "axes.spines.top": False}
    with matplotlib.rc_context({**style, "axes.spines.right": False, "legend.frameon": False}):
        canvas = Figure(figsize=(7.0, 4.2), layout="constrained")
        axes = canvas.subplots()
        seen: dict[str, int] = {}
        for curve in curves:
            kind = WAYS[curve.name].kind
            dash = ("-", "--", ":")[seen.setdefault(kind, 0) % 3]
            seen[kind] += 1
            seconds, bits = zip(*curve.points[1:])
            axes.plot(
                seconds, bits, dash, color=COLORS[kind], marker="o", markersize=3, label=curve.what.replace("`", "")
            )
            axes.plot([seconds[-1]] * len(curve.ends), curve.ends, "_", color=COLORS[kind], markersize=9)
        axes.set_xlabel("processor seconds in steps")
        axes.set_ylabel("bits per byte of held-out text")
        canvas.legend(loc="outside upper left", ncols=2, fontsize=8, columnspacing=1)
        with replacing(path) as temporary:
            canvas.savefig(temporary, format="png", dpi=150)
