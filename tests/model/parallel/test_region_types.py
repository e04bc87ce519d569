"""Types of spmd-types hold for every kind of block over tensor ranks, and a reduction too few or too many breaks them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from amfm.model.parallel import regions
from tests.helpers.spawn import run_ranks

pytest.importorskip("spmd_types", reason="NOT TESTED: spmd-types, which checks types over ranks, is not installed")

from tests.model.parallel import region_types


def check_both(some: bool) -> list[dict[str, str]]:
    return [region_types.check_all(sequence_parallel, some) for sequence_parallel in (False, True)]


@pytest.mark.parametrize("some", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["kinds", "forms"])
def test_every_kind_of_block_keeps_its_types(some: bool) -> None:
    assert run_ranks(check_both, some, num_ranks=1) == [[{}, {}]]


def missing(*given: Any, **named: Any) -> Any:
    """No reduction at all."""
    return given[0]


def twice(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reduction of what a reduction gave."""

    def both(first: Any, *given: Any, **named: Any) -> Any:
        return function(function(first, *given, **named), *given, **named)

    return both


def check_planted(fault: str, sequence_parallel: bool) -> dict[str, str]:
    """What is wrong in blocks of some kinds with a fault."""
    if fault == "partial":  # parameters whose gradients are parts, and no one adds them up
        type_of = region_types.type_of
        region_types.type_of = lambda shard: type_of(region_types.Shard(shard.cuts))
    elif fault == "backward":  # a gather whose gradients are added up where they are whole, and the other way round
        gather = regions._gather

        def turned(own: torch.Tensor, group: Any, *, gradients_are_parts: bool = True) -> torch.Tensor:
            return gather(own, group, gradients_are_parts=not gradients_are_parts)

        regions._gather = turned
    else:
        name, how = fault.split()
        function = getattr(regions, name)
        setattr(regions, name, missing if how == "missing" else twice(function))
    return region_types.check_all(sequence_parallel, some=True)


# With how many kinds of blocks it is an error at least; under sequence parallelism most sums are reduce-scatters, whose
# absence changes a shape.
PLANTED = [
    ("_reduce missing", False, 20),
    ("_reduce twice", False, 20),
    ("_sum_gradients missing", False, 20),
    ("_sum_gradients twice", False, 20),
    ("_reduce missing", True, 1),
    ("_reduce twice", True, 1),
    ("_sum_gradients missing", True, 2),
    ("_sum_gradients twice", True, 2),
    ("backward", True, 2),
    ("partial", True, 20),
]


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "sequence_parallel", "least"), PLANTED)
def test_a_planted_fault_is_an_error_in_every_kind_of_block_that_has_it(
    fault: str, sequence_parallel: bool, least: int
) -> None:
    (wrong,) = run_ranks(check_planted, fault, sequence_parallel, num_ranks=1)
    assert len(wrong) >= least, wrong.keys()
