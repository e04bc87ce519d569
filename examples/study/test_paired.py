"""A difference is called one only where the seeds show it."""

from __future__ import annotations

import math

import pytest
from amfm_study.paired import compare


def judged(*differences: float, lower_is_better: bool = True) -> str:
    first = {seed: 3.0 + seed for seed in range(len(differences))}
    other = {seed: first[seed] + found for seed, found in enumerate(differences)}
    difference = compare("b", "a", other, first, lower_is_better=lower_is_better)
    assert difference is not None
    return difference.verdict


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((-0.10, -0.11, -0.09), "better"),
        ((0.10, 0.11, 0.09), "worse"),
        ((-0.01, -0.30, -0.05), "better with each of 3 seeds, but the interval has 0: not shown"),
        ((-0.1, 0.2, 0.0), "no difference shown"),
        ((-0.5,), "one seed: no verdict"),
    ],
)
def test_a_verdict_follows_the_interval(differences: tuple[float, ...], verdict: str) -> None:
    assert judged(*differences) == verdict


def test_of_accuracies_the_higher_is_better() -> None:
    assert judged(0.10, 0.11, 0.09, lower_is_better=False) == "better"


def test_only_common_seeds_are_compared_and_the_interval_is_students() -> None:
    difference = compare("b", "a", {0: 1.0, 1: 2.0, 5: 9.0}, {0: 0.5, 1: 1.0, 2: 7.0}, lower_is_better=True)
    assert difference is not None and difference.by_seed == {0: 0.5, 1: 1.0} and difference.interval is not None
    # Two values 0.5 apart: the deviation is 0.5 / sqrt(2), t of one degree of freedom 12.706.
    half = 12.706 * 0.5 / math.sqrt(2) / math.sqrt(2)
    assert difference.interval == pytest.approx((0.75 - half, 0.75 + half))
    assert compare("b", "a", {0: 1.0}, {1: 1.0}, lower_is_better=True) is None
