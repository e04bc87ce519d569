"""Picture of a soak: the step that the run had reached against the time, round after round, and the faults on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import matplotlib
from matplotlib.figure import Figure

from tests.soak.faults import LOCAL_KINDS, RAY_KINDS
from tests.soak.settings import STEPS

# For people who do not see all colours (Wong 2011, Nature Methods 8, 441).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
MARKERS = "osv^DPX*<>hp"
NAMES = tuple(dict.fromkeys(kind.name for kind in (*LOCAL_KINDS, *RAY_KINDS)))
STYLE = {"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


class DrawnStrike(Protocol):
    """A fault, as a picture needs it."""

    kind: str
    seconds: float
    step: int


class Drawn(Protocol):
    """A round, as a picture needs it."""

    layout: str
    trail: list[tuple[float, int]]

    @property
    def strikes(self) -> Sequence[DrawnStrike]: ...


def draw_soak(
    rounds: Sequence[Drawn], title: str, path: Path, names: Sequence[str] = NAMES, steps: int = STEPS
) -> None:
    """Write the picture; the suffix chooses the format. Every fault is a mark on the step that was logged last before it."""
    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=(12, 4.2), layout="constrained")
        axes = canvas.subplots()
        for found in rounds:
            axes.plot(
                [seconds / 60 for seconds, _ in found.trail],
                [step for _, step in found.trail],
                color="#999999",
                linewidth=0.8,
            )
            if found.trail:
                words = found.layout.replace(", ", "\n")
                axes.annotate(words, (found.trail[0][0] / 60, steps * 1.03), fontsize=7, color="#555555")
        for place, name in enumerate(names):
            strikes = [struck for found in rounds for struck in found.strikes if struck.kind == name]
            if strikes:
                axes.scatter(
                    [struck.seconds / 60 for struck in strikes],
                    [struck.step for struck in strikes],
                    color=COLOURS[place % len(COLOURS)],
                    marker=MARKERS[place % len(MARKERS)],
                    s=22,
                    zorder=3,
                    label=f"{name} ({len(strikes)})",
                )
        axes.set_xlabel("minutes")
        axes.set_ylabel("step")
        axes.set_ylim(0, steps * 1.2)
        axes.set_title(title, loc="left")
        if any(found.strikes for found in rounds):
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        canvas.savefig(path)
