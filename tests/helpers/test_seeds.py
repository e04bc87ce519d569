"""Tests draw by their names."""

from __future__ import annotations

import random

import numpy
import pytest
import torch

from tests.helpers.seeds import seed_of, seeded
from tests.helpers.spawn import run_ranks


def draw() -> list[float]:
    return [random.random(), numpy.random.rand(), float(torch.rand(()))]


@pytest.fixture(scope="module")
def shared() -> list[float]:
    return draw()


def expected(name: str, request: pytest.FixtureRequest) -> list[float]:
    with seeded(seed_of(name, request.config.getoption("seed_offset"))):
        return draw()


def test_a_test_and_its_ranks_draw_by_its_name(request: pytest.FixtureRequest) -> None:
    wanted = expected(request.node.nodeid, request)
    assert run_ranks(draw, num_ranks=2) == [wanted, wanted]
    assert draw() == wanted


def test_what_tests_share_draws_by_its_own_name_and_leaves_theirs_alone(
    request: pytest.FixtureRequest, shared: list[float]
) -> None:
    assert shared == expected("tests/helpers/test_seeds.py::shared[0]", request)
    assert draw() == expected(request.node.nodeid, request)
    assert seed_of("a", 0) != seed_of("a", 1) != seed_of("b", 1)
