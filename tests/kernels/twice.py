"""What kernels compute once more is bitwise identical: in each case on a GPU, in every fifth in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.helpers.numbers import assert_bitwise

Result = TypeVar("Result")


class Twice(Protocol):
    """Computes something, in some cases twice, bitwise identical."""

    def __call__(self, compute: Callable[[], Result]) -> Result:
        """What `compute` returns the first time."""


def compute_twice(compute: Callable[[], Result]) -> Result:
    """What `compute` returns; fails unless a second time is bitwise identical."""
    once, again = compute(), compute()
    leaves = [[leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)] for found in (once, again)]
    assert leaves[0], "nothing to compare"
    for number, (one, other) in enumerate(zip(*leaves, strict=True)):
        assert_bitwise(other, one, f"tensor {number} repeated")
    return once


def compute_once(compute: Callable[[], Result]) -> Result:
    """What `compute` returns."""
    return compute()
