"""The law finds numbers that it was made of, and its proposal is the lowest mixture of a law that is known."""

from __future__ import annotations

import numpy as np
import pytest
from amfm_study.mixture import law as law_file
from amfm_study.mixture.law import Law, fit_law, lowest_mixture, propose, rank_correlation

KNOWN = Law(np.array([1.0, 2.0, 0.5]), np.array([[-2.0, 0.1, 0.3], [0.2, -1.0, 0.0], [0.5, 0.4, -0.5]]))
OBJECTIVE = np.array([0.6, 0.3, 0.1])
EQUAL = np.full((1, 3), 1 / 3)


def draw(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(3), size=count)


def test_a_law_is_found_again_from_its_own_losses() -> None:
    mixtures, others = draw(16, 0), draw(50, 1)
    law = fit_law(mixtures, KNOWN.predict(mixtures))
    # The grid of floors has no more digits than that.
    np.testing.assert_allclose(law.predict(others), KNOWN.predict(others), atol=5e-3)


def test_the_proposal_is_close_to_the_lowest_mixture_and_noise_is_in_its_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(law_file, "RESAMPLES", 50)
    mixtures, candidates = draw(24, 0), draw(10_000, 2)
    losses = KNOWN.predict(mixtures) + 0.005 * np.random.default_rng(3).standard_normal((24, 3))
    found = propose(mixtures, losses, OBJECTIVE, candidates)
    lowest = (KNOWN.predict(candidates) @ OBJECTIVE).min()
    value = float(KNOWN.predict(found.mixture[None])[0] @ OBJECTIVE)
    assert lowest <= value < lowest + 0.01 < float(KNOWN.predict(EQUAL)[0] @ OBJECTIVE)
    best, _ = lowest_mixture(KNOWN, OBJECTIVE, candidates)
    assert (found.low - 0.02 <= best).all() and (best <= found.high + 0.02).all() and (found.low <= found.high).all()
    again = propose(mixtures, losses, OBJECTIVE, candidates)
    assert (again.mixture == found.mixture).all() and (again.low == found.low).all()


def test_ranks_correlate_by_order_alone() -> None:
    assert rank_correlation(np.array([1.0, 2.0, 9.0]), np.array([0.1, 0.2, 0.3])) == 1.0
    assert rank_correlation(np.array([1.0, 2.0, 9.0]), np.array([3.0, 2.0, 1.0])) == -1.0
