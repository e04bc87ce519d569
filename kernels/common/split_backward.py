"""Weight gradients that are computed later than those of inputs: the second half of a backward pass that is cut in two.

A zero-bubble schedule (Qi et al. 2023, arXiv 2401.10241, section 2) wants the gradients of inputs first, for which the
pipeline stage before waits, and fills its gaps with those of weights. Autograd on its own cannot cut an operation that computes
both: it would run it twice. So operations that multiply by large weights ask here. While a pass is split, they compute
their input's gradient, leave the weight's as a function on the micro-batch's list, and give autograd none for it; the
schedule runs the list when its turn comes. What else a backward pass computes (scans, norms, small parameters) stays whole.

The list belongs to the process and not to a thread, since autograd runs a GPU's backward pass in a separate thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WeightsHalf:
    """What one operation left to compute: the gradients of `weights`, in their order; None for one that landed in its sum."""

    weights: Sequence[Tensor]
    compute: Callable[[], Sequence[Tensor | None]]


Later = list[WeightsHalf]

_passes: list[Later] = []  # that are being split, the innermost last


@contextmanager
def split_backward(later: Later) -> Iterator[None]:
    """Let forward passes inside prepare for a split, and backward passes inside add their weights' half to `later`."""
    _passes.append(later)
    try:
        yield
    finally:
        _passes.pop()


def is_splitting() -> bool:
    """Whether a pass is being split."""
    return bool(_passes)


def is_split(*weights: Tensor) -> bool:
    """Whether gradients of these weights are computed later: all are parameters themselves, and a pass is being split."""
    return bool(_passes) and all(weight.is_leaf and weight.requires_grad for weight in weights)


def compute_later(weights: Sequence[Tensor], compute: Callable[[], Sequence[Tensor | None]]) -> None:
    """Leave the gradients of `weights`, which `compute` gives in their order, for the weights' half of this pass.

    None for a weight whose gradient it added to its sum (gradient_sum.py).
    """
    assert _passes, "no pass is being split"
    _passes[-1].append(WeightsHalf(weights, compute))


@torch.no_grad()
def compute_now(later: Later, collect: Callable[[Tensor], None]) -> None:
    """Compute what was left, add it to the weights' gradients, and empty the list as it goes.

    `collect` is called with each weight as soon as all of this pass is in its gradient, so that few of them are there.
    """
    uses = Counter(id(weight) for half in later for weight in half.weights)
    later.reverse()
    while later:
        half = later.pop()
        for weight, gradient in zip(half.weights, half.compute(), strict=True):
            if gradient is not None:
                weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
            uses[id(weight)] -= 1
            if not uses[id(weight)]:
                collect(weight)
