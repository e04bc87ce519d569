"""The loss as a function of parameters N and tokens D, fitted to runs:

    L(N, D) = E + A / N^alpha + B / D^beta

the third approach of Hoffmann et al. 2022 (arXiv 2203.15556, section 3.3 and appendix D.3): least Huber loss, with a delta of
1e-3, of the error in log L, where log L is the log-sum-exp of a - alpha log N, b - beta log D and e. Huber's loss forgives
single runs that are far off. The starting points are theirs; all are tried once, and the best are optimized.

Intervals are those of fits to losses with errors drawn from those of the fit (a bootstrap of residuals, Efron 1979), enlarged
by sqrt(n / (n - 5)) because five numbers were fitted to n runs. A ladder is a grid: drawn runs could lack a size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Array = NDArray[np.float64]
DELTA = 1e-3
STARTS = np.array(
    list(
        itertools.product(
            range(0, 30, 5), range(0, 30, 5), (-1, -0.5, 0, 0.5, 1), (0, 0.5, 1, 1.5, 2), (0, 0.5, 1, 1.5, 2)
        )
    ),
    dtype=np.float64,
)
BEST_STARTS = 8
# Terms of N and of D at the mean run, E (all as logarithms, from nothing to more than any loss), alpha, beta. Exponents of 0
# would make A and E one number.
EXPONENTS = (0.01, 4.0)
BOUNDS = [(-12.0, 5.0), (-12.0, 5.0), (-5.0, 5.0), EXPONENTS, EXPONENTS]
NUMBERS = len(BOUNDS)
SEED = 20260105
INTERVAL = (0.05, 0.95)
FLOPS = 6.0  # per parameter and token, forward and backward


@dataclass(frozen=True)
class LossLaw:
    """Constants of L(N, D); `numbers`: a, b, e, alpha, beta, with A = e^a, B = e^b, E = e^e."""

    numbers: Array

    def predict(self, parameters: Array | float, tokens: Array | float) -> Array:
        """Losses, nats per token."""
        a, b, e, alpha, beta = self.numbers
        return np.asarray(np.exp(e) + np.exp(a - alpha * np.log(parameters)) + np.exp(b - beta * np.log(tokens)))

    def optimal_tokens_per_parameter(self, flops: float) -> float:
        """D / N at which FLOPS N D = flops has the lowest loss (equation 4 of the paper)."""
        a, b, _, alpha, beta = self.numbers
        factor = math.exp((math.log(alpha / beta) + a - b) / (alpha + beta))
        parameters = factor * (flops / FLOPS) ** (beta / (alpha + beta))
        return flops / FLOPS / parameters**2

    def constants(self) -> dict[str, float]:
        """The constants by the names of the paper."""
        a, b, e, alpha, beta = map(float, self.numbers)
        return {"E": math.exp(e), "A": math.exp(a), "alpha": alpha, "B": math.exp(b), "beta": beta}


@dataclass(frozen=True)
class Fitted:
    """A law, those of resampled losses, and the runs [n] that it was fitted to."""

    law: LossLaw
    resampled: tuple[LossLaw, ...]
    parameters: Array
    tokens: Array
    losses: Array

    @property
    def errors(self) -> Array:
        """Measured over predicted loss, minus 1, of the runs."""
        return np.asarray(self.losses / self.law.predict(self.parameters, self.tokens) - 1)

    def interval(self, parameters: float, tokens: float) -> tuple[float, float]:
        """Interval of a measured loss of a run that is not among them: of the law, and of one run's error about it."""
        generator = np.random.default_rng(SEED)
        noise = 1 + inflated(self.errors)[generator.integers(len(self.errors), size=len(self.resampled))]
        values = [float(law.predict(parameters, tokens)) for law in self.resampled]
        low, high = np.quantile(np.array(values) * noise, INTERVAL)
        return float(low), float(high)

    def constants(self) -> dict[str, tuple[float, float, float]]:
        """Constants by name, each with the ends of its interval."""
        drawn = [law.constants() for law in self.resampled]
        found = {}
        for name, value in self.law.constants().items():
            low, high = np.quantile([constants[name] for constants in drawn], INTERVAL)
            found[name] = (value, float(low), float(high))
        return found

    def optimal_ratio(self, flops: float) -> tuple[float, float, float]:
        """Tokens per parameter with the lowest loss at so many FLOPs, with its interval."""
        drawn = [law.optimal_tokens_per_parameter(flops) for law in self.resampled]
        low, high = np.quantile(drawn, INTERVAL)
        return self.law.optimal_tokens_per_parameter(flops), float(low), float(high)


def fit_ladder(parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float], resamples: int) -> Fitted:
    """Fit the law to runs, and again to `resamples` draws of their errors.

    Raises ValueError for fewer than six runs, three sizes or two numbers of tokens, which cannot tell its five constants.
    """
    n_r, d_r, losses_r = (np.asarray(values, dtype=np.float64) for values in (parameters, tokens, losses))
    if len(losses_r) <= NUMBERS or len(np.unique(n_r)) < 3 or len(np.unique(d_r)) < 2:
        raise ValueError(
            f"{len(losses_r)} runs of {len(np.unique(n_r))} sizes do not tell the five constants of the law; measure 6 runs at "
            "least, of 3 sizes"
        )
    logs = np.log(n_r), np.log(d_r), np.log(losses_r)
    law = LossLaw(fit(logs, STARTS, BEST_STARTS))
    predicted = law.predict(n_r, d_r)
    errors = inflated(np.asarray(losses_r / predicted - 1))
    generator = np.random.default_rng(SEED)
    resampled = []
    for _ in range(resamples):
        drawn = predicted * (1 + generator.choice(errors, size=len(errors)))
        resampled.append(LossLaw(fit((logs[0], logs[1], np.log(drawn)), law.numbers[None], 1)))  # the least is near)
    return Fitted(law, tuple(resampled), n_r, d_r, losses_r)


def inflated(errors: Array) -> Array:
    """Errors of the fit, centered and as large as those of runs that five numbers were not fitted to."""
    return np.asarray((errors - errors.mean()) * math.sqrt(len(errors) / max(1, len(errors) - NUMBERS)))


def fit(logs: tuple[Array, Array, Array], starts: Array, optimized: int) -> Array:
    """Numbers with the least objective, from the best of the starting points.

    About the mean of the logarithms: a and alpha then hardly depend on each other, which saves most of the iterations.
    """
    means = np.array([logs[0].mean(), logs[1].mean()])
    centered = logs[0] - means[0], logs[1] - means[1], logs[2]
    values = objective(starts, *logs)[0]
    best: tuple[float, Array] | None = None
    for start in starts[np.argsort(values, kind="stable")[:optimized]]:
        moved = start.copy()
        moved[:2] -= start[3:] * means
        found = minimize(
            lambda numbers: tuple(part[0] for part in objective(numbers[None], *centered)),
            moved,
            jac=True,
            method="L-BFGS-B",
            bounds=BOUNDS,
            options={"maxiter": 300},
        )
        if best is None or found.fun < best[0]:
            best = float(found.fun), np.asarray(found.x, dtype=np.float64)
    assert best is not None, "there are starting points"
    numbers = best[1].copy()
    numbers[:2] += numbers[3:] * means
    return numbers


def objective(numbers: Array, log_n: Array, log_d: Array, log_loss: Array) -> tuple[Array, Array]:
    """Sum of Huber losses [S] of S sets of numbers [S, 5], in units of DELTA^2, and its gradient [S, 5]."""
    a, b, e, alpha, beta = (column[:, None] for column in numbers.T)
    terms = np.stack([a - alpha * log_n, b - beta * log_d, np.broadcast_to(e, (len(numbers), len(log_n)))])
    largest = terms.max(axis=0)
    parts = np.exp(terms - largest)
    total = parts.sum(axis=0)
    error = (largest + np.log(total) - log_loss) / DELTA
    small = np.abs(error) <= 1
    value = np.where(small, error**2 / 2, np.abs(error) - 0.5).sum(axis=1)
    slope = np.where(small, error, np.sign(error)) / DELTA * (parts / total)  # [3, S, n]
    gradient = [
        slope[0].sum(axis=1),
        slope[1].sum(axis=1),
        slope[2].sum(axis=1),
        -(slope[0] * log_n).sum(axis=1),
        -(slope[1] * log_d).sum(axis=1),
    ]
    return value, np.stack(gradient, axis=1)
