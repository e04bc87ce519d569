"""Drawn models under drawn layouts have the loss and the gradients of one rank in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings

from tests.parallel.drawn import Case, Ranks, cases, compute_alone, ranks_that_wait

# float64: only the order of sums differs; a delta rule amplifies it.
TOLERANCE = 1e-8
DRAWN = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with ranks_that_wait(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    with ranks_that_wait(4) as ranks:
        yield ranks


def assert_as_one_rank(case: Case, ranks: Ranks) -> None:
    expected = compute_alone(case, len(ranks.connections))
    scale = max(float(value.norm()) for value in expected.values())
    for rank, found in enumerate(ranks.compute(case)):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            error = float((found[name] - value).norm())
            assert error <= TOLERANCE * (float(value.norm()) + 1e-3 * scale), f"rank {rank}: {name} is off by {error}"


@given(case=cases(2))
@settings(DRAWN, max_examples=5, derandomize=True)
def test_drawn_layouts_of_two_ranks_compute_what_one_does(two: Ranks, case: Case) -> None:
    assert_as_one_rank(case, two)


@pytest.mark.slow
@given(case=cases(2))
@settings(DRAWN, max_examples=150)
def test_many_drawn_layouts_of_two_ranks_compute_what_one_does(two: Ranks, case: Case) -> None:
    assert_as_one_rank(case, two)


@pytest.mark.slow
@given(case=cases(4))
@settings(DRAWN, max_examples=150)
def test_many_drawn_layouts_of_four_ranks_compute_what_one_does(four: Ranks, case: Case) -> None:
    assert_as_one_rank(case, four)
