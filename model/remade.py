"""Makes a tensor again in backward passes that forward passes would keep for them.

What is cheap to make out of what is kept anyway need not be kept: the norm in front of a block is one pass over the residual
stream, which the norm keeps for its own gradient. Operations that read it keep it as ever, and do not know that they
keep a note instead (`torch.autograd.graph.saved_tensors_hooks`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Result = TypeVar("Result")


class Part(NamedTuple):
    """A view of what is made again, in place of a kept tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class Remade:
    """A context in which nothing keeps `tensor`, nor views of it: `make` makes it again, with the same bits.

    It is made once for all who kept it, when the first of them asks, and let go with the last. The context may be entered
    more than once, and none may be open around it, whose tensors would not reach it.
    """

    def __init__(self, tensor: Tensor, make: Callable[[], Tensor]) -> None:
        self.storage, self.make = tensor.untyped_storage()._cdata, make
        self.readers = 0
        self.made: Tensor | None = None
        self.hooks: saved_tensors_hooks | None = None

    def __enter__(self) -> None:
        self.hooks = saved_tensors_hooks(self._pack, self._unpack)
        self.hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        hooks, self.hooks = self.hooks, None  # or both would hold each other, and what is made, beyond their time
        assert hooks is not None, "entered before"
        hooks.__exit__(*error)

    def _pack(self, kept: Tensor) -> Tensor | Part:
        if kept.untyped_storage()._cdata != self.storage:
            return kept
        self.readers += 1
        return Part(kept.shape, kept.stride(), int(kept.storage_offset()))

    def _unpack(self, kept: Tensor | Part) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if self.made is None:
            with torch.no_grad():
                self.made = self.make()
        view = self.made.as_strided(*kept)
        self.readers -= 1
        if self.readers <= 0:
            self.made = None
        return view


def run_inside(context: Remade, steps: Generator[None, None, Result]) -> Generator[None, None, Result]:
    """Run a generator inside a context that is left wherever it pauses, so that others who run meanwhile are not in it."""
    while True:
        with context:
            try:
                next(steps)
            except StopIteration as end:
                result: Result = end.value
                return result
        yield
