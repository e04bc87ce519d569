"""Codes of weights that are made once per step and kept for all its passes.

A weight is quantised wherever a product reads it: 3 bytes a number for each product of each micro-batch, which for experts with
few rows takes longer than the products. Between the first forward pass of a step and its update weights stay as they are. Who
knows when that is opens `keep_weights` around it; inside, a weight is quantised the first time, in both directions (2 bytes a
number of FP8), and kept until the block ends. Outside of such a block nothing is kept.

A weight is known by its memory, because what a recomputed block gets are copies of its parameters. Blocks do not nest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor

Made = TypeVar("Made")

# Inside a block, one dictionary: what was made by the memory of a weight, which is held so that no other takes its place.
_blocks: list[dict[tuple[Any, ...], tuple[Tensor, Any]]] = []


@contextmanager
def keep_weights() -> Iterator[None]:
    """Inside the block, in which no weight with a recipe may change, each is quantised once."""
    assert not _blocks, "weights are kept already"
    kept: dict[tuple[Any, ...], tuple[Tensor, Any]] = {}
    _blocks.append(kept)
    try:
        yield
    finally:
        _blocks.remove(kept)


def keeps_weights() -> bool:
    """Whether what is made of a weight now will be kept."""
    return bool(_blocks)


def made_once(weight: Tensor, what: str, make: Callable[[], Made]) -> Made:
    """What `make` makes of a weight, `what` telling apart several of one weight; kept inside `keep_weights`."""
    if not _blocks:
        return make()
    kept = _blocks[-1]
    storage = weight.untyped_storage()._cdata
    key = (storage, weight.storage_offset(), tuple(weight.shape), weight.stride(), weight.dtype, what)
    if key not in kept:
        kept[key] = weight.detach(), make()
    found: Made = kept[key][1]
    return found
