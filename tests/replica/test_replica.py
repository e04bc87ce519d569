"""Classes of transformers, trained by a plain PyTorch loop, give the losses and gradient norms of our runs."""

from __future__ import annotations

from typing import Any

import pytest

from tests.replica.families import FAMILIES
from tests.replica.faults import FAULTS, PLANTED
from tests.replica.runs import LAYOUTS, name_of, trained

FEW = 8  # steps in which a fault shows


def test_a_few_steps_of_one_class_are_those_of_the_plain_loop() -> None:
    (found,) = trained("lfm2_moe", 4).compare_runs([{}], 1)
    assert found.agrees, found


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", LAYOUTS, ids=lambda number: f"{number}ranks")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_is_that_of_the_plain_loop(family: str, num_ranks: int) -> None:
    layouts = LAYOUTS[num_ranks]
    found = trained(family).compare_runs(layouts, num_ranks)
    parted = {name_of(layout): each for layout, each in zip(layouts, found, strict=True) if not each.agrees}
    assert not parted


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "family", "num_ranks", "layout"), PLANTED, ids=str)
def test_a_planted_fault_is_seen(fault: str, family: str, num_ranks: int, layout: dict[str, Any]) -> None:
    (found,) = trained(family, FEW).compare_runs([layout], num_ranks, fault)
    assert not found.agrees, found


def test_every_fault_is_planted() -> None:
    assert {fault for fault, *_ in PLANTED} == set(FAULTS)
