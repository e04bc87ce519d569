"""Bytes that PyTorch's operations between kernels read and write: what a block does besides products, our kernels and exchanges.

Each tensor counts once in an operation that reads it and once in one that writes it, with the numbers that it shows: what a
broadcast repeats is read once, what is looked up is read as often as it is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

QUIET = ("detach", "lift_fresh", "_unsafe_view", "alias")  # operations that launch nothing
PRODUCTS = ("linear", "_grouped_mm", "_scaled_mm", "_scaled_grouped_mm")  # of which torch knows no FLOPs
LOOK_UPS = ("index_select", "index", "gather", "embedding", "take")
# What they write is all that they touch: `out` of a fill, and the first argument of a copy.
FILLS = (
    "fill_",
    "zero_",
    "zeros",
    "zeros_like",
    "ones",
    "ones_like",
    "full",
    "full_like",
    "new_zeros",
    "new_ones",
    "arange",
)


def launches(func: Any) -> bool:
    """Whether an operation launches a kernel on a GPU: views and empty tensors do not."""
    return not (func.is_view or "empty" in func._opname or func._opname in QUIET)


def is_between(func: Any) -> bool:
    """Whether an operation that launches is between kernels: one of PyTorch's that is neither product nor exchange.

    What keeps a gradient of the block's input is not: in a model other operations take it.
    """
    if func.namespace != "aten" or func._overloadpacket in flop_registry or func._opname in PRODUCTS:
        return False
    node = torch._C._current_autograd_node()
    return node is None or not node.name().endswith("AccumulateGrad")


def moved_bytes(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes that one operation reads and writes."""
    read = {name: value for name, value in kwargs.items() if name != "out"}
    inputs = [leaf for leaf in tree_leaves((args, read)) if isinstance(leaf, Tensor)]
    written = shown_bytes(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
    if func._opname in FILLS:
        return written
    if func._opname == "copy_":
        return written + shown_bytes(inputs[1:])
    if func._opname in LOOK_UPS:
        return 2 * written + shown_bytes(inputs[1:])
    return written + shown_bytes(inputs)


def shown_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the numbers that tensors show, each view once; dims that a broadcast repeats count once."""
    seen = {(each.untyped_storage()._cdata, each.storage_offset(), each.shape, each.stride()): each for each in tensors}
    total = 0
    for each in seen.values():
        count = each.itemsize
        for length, stride in zip(each.shape, each.stride()):
            count *= length if stride or length == 1 else 1
        total += count
    return total
