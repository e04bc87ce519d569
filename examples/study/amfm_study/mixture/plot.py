"""One picture of a study of mixtures: is the law right, and what does it propose?"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from amfm.data_pipeline.durable.files import replacing
from amfm_study.mixture.cells import CHECK, FIT
from amfm_study.mixture.result import Found
from amfm_study.plots import COLOURS, STYLE


def draw_mixture(found: Found, path: Path) -> None:
    """Write a PNG of two panels: measured against predicted objective, and shares by source with their intervals."""
    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=(10.4, 3.8), layout="constrained")
        left, right = canvas.subplots(1, 2)
        draw_prediction(left, found)
        draw_shares(right, found)
        with replacing(path) as file:
            canvas.savefig(file, format="png", dpi=130, metadata={"Software": None})


def draw_prediction(panel: Axes, found: Found) -> None:
    """Runs that the law was fitted to, runs that it was not, and where both would be equal."""
    for kind, label, face in ((FIT, "fitted", "none"), (CHECK, "not fitted", COLOURS[1])):
        tried = found.sampled.only(kind)
        predicted = found.law.predict(tried.mixtures) @ found.search.objective
        edge = COLOURS[0] if kind == FIT else COLOURS[1]
        panel.plot(predicted, tried.objectives, "o", markerfacecolor=face, markeredgecolor=edge, label=label)
    ends = [found.sampled.objectives.min(), found.sampled.objectives.max()]
    panel.plot(ends, ends, color="#7f7f7f", linewidth=1)
    panel.set_title("Objective of sampled mixtures")
    panel.set_xlabel("predicted, nats per token")
    panel.set_ylabel("measured, nats per token")
    panel.legend()


def draw_shares(panel: Axes, found: Found) -> None:
    """Configured and proposed shares, side by side for each source."""
    search, proposal = found.search, found.proposal
    places = np.arange(len(search.sources))
    panel.bar(places - 0.2, search.configured, 0.38, color="#bbbbbb", label="configured")
    panel.bar(places + 0.2, proposal.mixture, 0.38, color=COLOURS[0], label="proposed")
    # The mean of candidates may be outside of the resamples' interval: a bar of length 0 there.
    below, above = (proposal.mixture - proposal.low).clip(0), (proposal.high - proposal.mixture).clip(0)
    panel.errorbar(places + 0.2, proposal.mixture, [below, above], fmt="none", color="black", capsize=3)
    panel.set_xticks(places, search.sources)
    panel.set_ylim(0, 1)
    panel.set_title("Share of the training tokens")
    panel.legend()
