"""Someone who looks, now and then, at the operands that products quantise.

Products tell each of their wide operands here before they quantise it, and no one listens but inside `watch_operands`.
A listener tells weights apart by the seeds of their recipes. A list and no context variable: autograd runs backward
passes in separate threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor

from amfm.kernels.low_precision.recipe import Recipe

Role = Literal["input", "gradient", "weight"]
Listener = Callable[[Recipe, Role, Tensor], None]

_listeners: list[Listener] = []


@contextmanager
def watch_operands(listener: Listener) -> Iterator[None]:
    """Inside the block call `listener(recipe, role, matrix)` with each operand of a product by a recipe.

    Inputs and weights come in forward passes, also of blocks that are computed again, gradients in backward passes.
    """
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def is_watched() -> bool:
    """Whether there is a listener: then operands are made wide that else are only made as codes."""
    return bool(_listeners)


def note_operands(recipe: Recipe, **operands: Tensor) -> None:
    """Tell listeners of the wide operands of a product, by their roles."""
    for listener in _listeners:
        for role, matrix in operands.items():
            listener(recipe, role, matrix)  # type: ignore[arg-type]
