"""What a study of mixtures found, as JSON values and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amfm_study.grid import Cell
from amfm_study.mixture.cells import CHECK, CONFIGURED, EQUAL, FIT, PROPOSAL, Search, named, weights_of
from amfm_study.mixture.law import INTERVAL, Law, Proposal, rank_correlation

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Tried:
    """Finished runs: their cells, mixtures [n, S], measured losses [n, S], and objectives [n]."""

    cells: Sequence[Cell]
    mixtures: Array
    losses: Array
    objectives: Array

    @classmethod
    def of(cls, cells: Sequence[Cell], losses: Array, search: Search) -> Tried:
        """Runs with their measured losses."""
        return cls(cells, weights_of(cells), losses, losses @ search.objective)

    def only(self, kind: str) -> Tried:
        """Those whose label begins so."""
        places = [number for number, cell in enumerate(self.cells) if cell.mixer.startswith(kind)]
        cells = [self.cells[place] for place in places]
        return Tried(cells, self.mixtures[places], self.losses[places], self.objectives[places])


@dataclass(frozen=True)
class Found:
    """The whole result: what was searched, sampled runs, the law, its proposal, and the runs that tried it."""

    search: Search
    sampled: Tried
    law: Law
    proposal: Proposal
    compared: Tried

    @property
    def checks(self) -> tuple[Array, Array]:
        """Predicted and measured objectives of the sampled runs that the law does not know."""
        unknown = self.sampled.only(CHECK)
        return self.law.predict(unknown.mixtures) @ self.search.objective, unknown.objectives

    def gains(self, label: str) -> Array:
        """How much lower the proposal's objective is than that of a label, seed by seed; nats per token."""
        return self.compared.only(label).objectives - self.compared.only(PROPOSAL).objectives


def mixture_json(found: Found) -> dict[str, Any]:
    """The study as JSON values."""
    search, proposal = found.search, found.proposal
    predicted, measured = found.checks
    runs = [
        {
            "name": cell.name,
            "seed": cell.seed,
            "weights": named(search, mixture),
            "losses": named(search, losses),
            "objective": float(objective),
        }
        for tried in (found.sampled, found.compared)
        for cell, mixture, losses, objective in zip(tried.cells, tried.mixtures, tried.losses, tried.objectives)
    ]
    labels = [label for label in (EQUAL, CONFIGURED) if found.compared.only(label).cells]
    return {
        "objective": named(search, search.objective),
        "proposal": {
            name: {"weight": weight, "low": float(low), "high": float(high)}
            for (name, weight), low, high in zip(named(search, proposal.mixture).items(), proposal.low, proposal.high)
        },
        "predicted": dict(zip(("objective", "low", "high"), proposal.predicted)),
        "measured": found.compared.only(PROPOSAL).objectives.tolist(),
        "gain": {label: found.gains(label).tolist() for label in labels},
        "checks": {
            "mean_error": float(np.abs(predicted - measured).mean()),
            "rank_correlation": rank_correlation(predicted, measured),
            "runs": len(measured),
        },
        "law": {
            name: {"floor": float(floor), "exponents": named(search, exponents)}
            for name, floor, exponents in zip(search.sources, found.law.floors, found.law.exponents)
        },
        "runs": runs,
    }


def mixture_markdown(found: Found) -> str:
    """Proposal, comparison and checks as tables, and what they say in words."""
    search, proposal, compared = found.search, found.proposal, found.compared
    low, high = (f"{100 * part:.0f}%" for part in INTERVAL)
    lines = [f"| source | configured | proposed | {low} to {high} |", "|---|---|---|---|"]
    columns = zip(search.sources, search.configured, proposal.mixture, proposal.low, proposal.high)
    lines += [f"| {name} | {old:.3f} | {new:.3f} | {a:.3f} to {b:.3f} |" for name, old, new, a, b in columns]
    lines += ["", "| mixture | objective, nats per token | " + " | ".join(search.sources) + " | seeds |"]
    lines += ["|" + "---|" * (3 + len(search.sources))]
    for label in (PROPOSAL, CONFIGURED, EQUAL):
        own = compared.only(label)
        if own.cells:
            losses = " | ".join(f"{loss:.4f}" for loss in own.losses.mean(axis=0))
            lines.append(f"| {label} | {describe(own.objectives)} | {losses} | {len(own.cells)} |")
    predicted, measured = found.checks
    value, value_low, value_high = proposal.predicted
    error = np.abs(predicted - measured).mean()
    lines += [
        "",
        f"Predicted for the proposal: {value:.4f} ({value_low:.4f} to {value_high:.4f}). The law was fitted to "
        f"{len(found.sampled.only(FIT).cells)} runs; of {len(measured)} others it misses the objective by {error:.4f} nats on "
        f"average, with a rank correlation of {rank_correlation(predicted, measured):.2f}.",
        *(say_gain(label, found.gains(label)) for label in (EQUAL, CONFIGURED) if compared.only(label).cells),
    ]
    return "\n".join(lines) + "\n"


def describe(values: Array) -> str:
    """Mean, and lowest to highest if there are several."""
    spread = f" ({values.min():.4f} to {values.max():.4f})" if len(values) > 1 else ""
    return f"{values.mean():.4f}{spread}"


def say_gain(label: str, gains: Array) -> str:
    """One sentence on the proposal and another mixture; equal signs over the seeds are asked for, not more."""
    weights = {EQUAL: "equal weights", CONFIGURED: "the configured weights"}[label]
    numbers = ", ".join(f"{gain:+.4f}" for gain in gains)
    if (gains > 0).all():
        return f"The proposal is better than {weights} with every seed ({numbers} nats)."
    if (gains < 0).all():
        return f"The proposal is worse than {weights} with every seed ({numbers} nats): do not take it."
    return f"Whether the proposal is better than {weights} depends on the seed ({numbers} nats): the study cannot tell."
