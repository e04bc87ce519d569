"""How the held-out loss of each source depends on the mixture, fitted to runs; and the mixture that it makes lowest.

    L_s(w) = c_s + exp(sum_j b_sj w_j),  w_j the share of source j

is the law of Ye et al. 2024, "Data Mixing Laws" (arXiv 2403.16952, section 3.2), whose factor k_s is part of b here because
shares sum to 1. For a given floor c_s the exponent is linear in w, so the floor is tried on a grid and the rest are least
squares: no starting point, no local minimum, the same numbers each time.

The proposal is the mean of the best hundredth of many mixtures that are drawn like those of the runs (Liu et al. 2024,
"RegMix", arXiv 2407.01492, section 3.3): it stays where the law was fitted. Intervals are those of the proposal over laws
fitted to runs drawn with replacement (Efron 1979).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
FLOORS = np.linspace(0.0, 0.98, 50)  # of the lowest loss that a run had
RIDGE = 1e-6  # keeps a resample with few distinct runs solvable
BEST_SHARE = 0.01
RESAMPLES, RESAMPLE_SEED = 200, 20260102
INTERVAL = (0.05, 0.95)


@dataclass(frozen=True)
class Law:
    """Losses of S sources as functions of a mixture: floors [S] and exponents [S, S], a row per source."""

    floors: Array
    exponents: Array

    def predict(self, mixtures: Array) -> Array:
        """Losses [n, S] of mixtures [n, S]."""
        return np.asarray(self.floors + np.exp(mixtures @ self.exponents.T))


@dataclass(frozen=True)
class Proposal:
    """A mixture [S], the interval of each share, and the objective that the law predicts for it with its interval."""

    mixture: Array
    low: Array
    high: Array
    predicted: tuple[float, float, float]


def fit_law(mixtures: Array, losses: Array) -> Law:
    """Fit the law to runs: mixtures [n, S] and the loss of each source [n, S], nats per token."""
    fitted = [fit_source(mixtures, losses[:, source]) for source in range(losses.shape[1])]
    return Law(np.array([floor for floor, _ in fitted]), np.array([exponents for _, exponents in fitted]))


def fit_source(mixtures: Array, losses: Array) -> tuple[float, Array]:
    """Floor and exponents [S] of one source, with the least squares of its losses [n] over the grid of floors."""
    best: tuple[float, float, Array] | None = None
    for floor in FLOORS * losses.min():
        # An error of the logarithm is one of the loss divided by loss - floor; so weighed, all runs count alike.
        scale = losses - floor
        weighed = mixtures * scale[:, None]
        square = weighed.T @ weighed + RIDGE * scale.max() ** 2 * np.eye(mixtures.shape[1])
        exponents = np.linalg.solve(square, weighed.T @ (scale * np.log(scale)))
        error = float(np.square(floor + np.exp(mixtures @ exponents) - losses).sum())
        if best is None or error < best[0]:
            best = error, float(floor), exponents
    assert best is not None
    return best[1], best[2]


def propose(mixtures: Array, losses: Array, objective: Array, candidates: Array) -> Proposal:
    """The mixture with the lowest objective [S] of predicted losses among candidates [m, S], with intervals over resamples."""
    mixture, lowest = lowest_mixture(fit_law(mixtures, losses), objective, candidates)
    generator = np.random.default_rng(RESAMPLE_SEED)
    others, values = [], []
    for _ in range(RESAMPLES):
        drawn = generator.integers(len(mixtures), size=len(mixtures))
        law = fit_law(mixtures[drawn], losses[drawn])
        others.append(lowest_mixture(law, objective, candidates)[0])
        values.append(float(law.predict(mixture[None])[0] @ objective))
    low, high = np.quantile(np.array(others), INTERVAL, axis=0)
    value_low, value_high = np.quantile(np.array(values), INTERVAL)
    return Proposal(mixture, low, high, (lowest, float(value_low), float(value_high)))


def lowest_mixture(law: Law, objective: Array, candidates: Array) -> tuple[Array, float]:
    """Mean of the best hundredth of the candidates, and the objective that the law predicts for it."""
    values = law.predict(candidates) @ objective
    best = np.argsort(values, kind="stable")[: max(1, round(BEST_SHARE * len(candidates)))]
    mixture = candidates[best].mean(axis=0)
    return mixture, float(law.predict(mixture[None])[0] @ objective)


def rank_correlation(left: Array, right: Array) -> float:
    """Spearman's correlation of two rows of numbers without ties, -1 to 1."""
    ranks = [np.argsort(np.argsort(values)).astype(np.float64) for values in (left, right)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
