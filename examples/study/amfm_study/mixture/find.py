"""From sampled runs to a proposal that was tried, in the order in which it happens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from amfm_study.grid import Cell
from amfm_study.mixture.cells import FIT, Search, compared_cells, draw_candidates
from amfm_study.mixture.config import MixtureStudyConfig
from amfm_study.mixture.law import fit_law, propose
from amfm_study.mixture.result import Found, Tried
from amfm_study.study import Study


def find_mixture(
    study: Study[MixtureStudyConfig], search: Search, cells: Sequence[Cell], measure: Callable[[Sequence[Cell]], Tried]
) -> Found:
    """Fit the law to the sampled runs, propose what it makes lowest, and try that. `measure` trains runs and measures them."""
    sampled = measure(cells)
    fitted = sampled.only(FIT)
    proposal = propose(fitted.mixtures, fitted.losses, search.objective, draw_candidates(search))
    compared = measure(compared_cells(study, search, proposal.mixture))
    return Found(search, sampled, fit_law(fitted.mixtures, fitted.losses), proposal, compared)
