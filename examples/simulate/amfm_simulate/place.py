"""Attribute an operation to a source line, to a kind of block and to one pass through it, in forward and backward alike.

How it works: the line is that of the innermost Python frame in amfm's packages or in a library that steps for it. A
backward operation has no such frame, so its block is found through autograd: nodes carry sequence numbers in the order
of the forward pass, and the numbers noted at the entrance and exit of a block enclose the nodes made inside it.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

import amfm.kernels

ROOT = f"{Path(amfm.kernels.__file__).parents[1]}/"
OWN = tuple(f"{ROOT}{name}/" for name in ("model", "kernels", "pretrain", "data_pipeline"))
# Libraries in whose code a step spends its time; the rest of what is installed is passed over.
LIBRARIES = ("/deepspeed/", "/megatron/", "/torch/distributed/pipelining/", "/torch/optim/")
OUTSIDE = "step"

_FILES: dict[CodeType, str | None] = {}


def current_line() -> str:
    """Innermost frame of amfm's packages or of `LIBRARIES`, as `pretrain/step.py:150 train_step`; `?` without one."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code not in _FILES:
            _FILES[code] = shown_file(code.co_filename)
        file = _FILES[code]
        if file is not None:
            return f"{file}:{frame.f_lineno} {code.co_name}"
        frame = frame.f_back
    return "?"


def shown_file(name: str) -> str | None:
    """File name as reports show it; None for a file whose frames are skipped."""
    if name.startswith(OWN):
        return name.removeprefix(ROOT)
    if any(library in name for library in LIBRARIES):
        return name.rpartition("/site-packages/")[2]
    return None


class BlockTracker:
    """Tells which kind of block an operation belongs to, and which pass of one, in forward and in backward.

    Autograd numbers its nodes in the order of the forward pass: those of a block are between the numbers at its
    entrance and its exit, and a node that runs names its number. `note_given` is called with the number of a pass and each
    tensor that it is given: arguments, and gradients of results.
    """

    def __init__(self, note_given: Callable[[int, Tensor], None]) -> None:
        self.note_given = note_given
        self.stack: list[tuple[str, int]] = []
        self.starts: list[int] = []
        self.places: list[tuple[str, int]] = []
        self.passes: dict[str, int] = {}
        self.last = 0
        self.going: WeakKeyDictionary[Generator[Any, Any, Any], int] = WeakKeyDictionary()

    def current(self) -> tuple[str, int]:
        """The block's kind, `embedding` or `head`, and the number of the pass, its backward pass included; (`step`, 0) outside."""
        if self.stack:
            return self.stack[-1]
        node = torch._C._current_autograd_node()
        place = -1 if node is None else bisect_right(self.starts, node._sequence_nr()) - 1
        return self.places[place] if place >= 0 else (OUTSIDE, 0)

    def is_backward(self) -> bool:
        """Whether autograd runs a backward node now."""
        return torch._C._current_autograd_node() is not None

    @contextmanager
    def inside(self, kind: str, number: int | None = None) -> Iterator[int]:
        """Count what runs in the `with` block as part of a block of this kind: of that pass, or of one that begins."""
        # Recomputation runs a block's forward inside backward: its nodes must not shift the numbers of the first pass.
        is_recomputed = self.is_backward()
        if is_recomputed:
            number = self.current()[1]
        elif number is None:
            self.last += 1
            number = self.last
            self.passes[kind] = self.passes.get(kind, 0) + 1
        if not is_recomputed:
            self._mark(kind, number)
        self.stack.append((kind, number))
        try:
            yield number
        finally:
            self.stack.pop()
            if not is_recomputed:
                self._mark(*(self.stack[-1] if self.stack else (OUTSIDE, 0)))

    def wrap(self, owner: Any, name: str, kind: str, *, begins: bool = True) -> None:
        """Replace a method of an object by one that runs inside the block `kind`; `begins`: it is a pass, not part of one.

        A part belongs to the pass around it, or to that which returned the generator that it is given.
        """
        method: Callable[..., Any] = getattr(owner, name)

        def run(*args: Any, **keywords: Any) -> Any:
            is_recomputed = self.is_backward()
            of = None if begins else self.going.get(args[0], self.current()[1])
            with self.inside(kind, of) as number:
                for tensor in tensors_in((args, keywords)):
                    self.note_given(number, tensor)
                result = method(*args, **keywords)
            if isinstance(result, Generator):
                self.going[result] = number
            for tensor in () if is_recomputed else tensors_in(result):
                if tensor.requires_grad:
                    tensor.register_hook(partial(self.note_given, number))
            return result

        setattr(owner, name, run)

    def forget_passes(self) -> None:
        """Forget the noted numbers between steps: no node of the last step runs again."""
        self.starts.clear()
        self.places.clear()
        self.passes.clear()

    def _mark(self, kind: str, number: int) -> None:
        self.starts.append(torch._C._autograd._get_sequence_nr())
        self.places.append((kind, number))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors in arguments or results, those in containers and in fields of dataclasses too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from tensors_in(entry)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in([getattr(value, field.name) for field in fields(value)])
