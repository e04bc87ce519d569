"""Attribute an operation to a source line and to a kind of block, in forward and backward alike.

How it works: the line is that of the innermost Python frame in amfm's packages or in a library that steps for it. A
backward operation has no such frame, so its block is found through autograd: nodes carry sequence numbers in the order
of the forward pass, and the numbers noted at the entrance and exit of a block enclose the nodes made inside it.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any

import torch

ROOT = f"{Path(__file__).parents[2]}/"
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
    """Tells which kind of block an operation belongs to, in forward and in backward.

    Autograd numbers its nodes in the order of the forward pass: those of a block lie between the numbers at its
    entrance and its exit, and a node that runs names its number.
    """

    def __init__(self) -> None:
        self.stack: list[str] = []
        self.starts: list[int] = []
        self.kinds: list[str] = []
        self.passes: dict[str, int] = {}

    def current(self) -> str:
        """The block's kind, `embedding` or `head`; `step` outside of them."""
        if self.stack:
            return self.stack[-1]
        node = torch._C._current_autograd_node()
        if node is None:
            return OUTSIDE
        place = bisect_right(self.starts, node._sequence_nr()) - 1
        return self.kinds[place] if place >= 0 else OUTSIDE

    def is_backward(self) -> bool:
        """Whether autograd runs a backward node now."""
        return torch._C._current_autograd_node() is not None

    @contextmanager
    def inside(self, kind: str, *, begins: bool = True) -> Iterator[None]:
        """Count what runs in the `with` block as part of a block of this kind; `begins`: it is a pass, not one's continuation."""
        # Recomputation runs a block's forward inside backward: its nodes must not shift the numbers of the first pass.
        is_recomputed = self.is_backward()
        if not is_recomputed:
            self._mark(kind)
            self.passes[kind] = self.passes.get(kind, 0) + begins
        self.stack.append(kind)
        try:
            yield
        finally:
            self.stack.pop()
            if not is_recomputed:
                self._mark(self.stack[-1] if self.stack else OUTSIDE)

    def wrap(self, owner: Any, name: str, kind: str, *, begins: bool = True) -> None:
        """Replace a method of an object by one that runs inside the block `kind`; `begins` as of `inside`."""
        method: Callable[..., Any] = getattr(owner, name)

        def run(*args: Any, **keywords: Any) -> Any:
            with self.inside(kind, begins=begins):
                return method(*args, **keywords)

        setattr(owner, name, run)

    def forget_passes(self) -> None:
        """Forget the noted numbers between steps: no node of the last step runs again."""
        self.starts.clear()
        self.kinds.clear()
        self.passes.clear()

    def _mark(self, kind: str) -> None:
        self.starts.append(torch._C._autograd._get_sequence_nr())
        self.kinds.append(kind)
