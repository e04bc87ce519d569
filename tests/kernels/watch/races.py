"""Finds accesses to memory that race on a GPU, in Triton's interpreter, which runs one program at a time and so hides
them.

Nothing orders the programs of a launch, nor the threads of a program between two barriers: Triton puts barriers around
shared memory, not around what a program stores and loads again itself. Two accesses to one element race if one of them
writes and nothing orders them. Atomic updates may meet each other. A program that loads and stores one element without a
barrier between counts as a race even where one thread does both: which thread does is the compiler's choice.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from triton.runtime import interpreter

from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.runtime.interpreter import replace_methods
from benchmarks.kernels.counting import memories_of

_NOBODY, _SEVERAL = -1, -2

# What may not meet each kind of access to the same element.
_CONFLICTS = {"reads": ("writes", "updates"), "writes": ("reads", "writes", "updates"), "updates": ("reads", "writes")}

_Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Race:
    """The first of its kind in a kernel: `argument` names whose memory it is, `line` where the later access stands."""

    kernel: str
    argument: str
    fault: str
    line: str


class _Accesses:
    """Which program touched each element of a memory in this launch, and when last."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.program: _Integers | None = None  # until the first access: most memories see only one kind of access
        self.time: _Integers | None = None

    def unordered(self, at: _Integers, program: int, time: int) -> tuple[bool, bool]:
        """Whether another program touched any of these elements, and whether this one did since its last barrier."""
        if self.program is None or self.time is None:
            return False, False
        before = self.program[at]
        own = before == program
        by_others = bool(np.any(~own & (before != _NOBODY)))
        return by_others, bool(np.any(own & (self.time[at] == time)))

    def note(self, at: _Integers, program: int, time: int) -> None:
        """Remember this program's access; elements that several programs touched are marked as such."""
        if self.program is None or self.time is None:
            self.program, self.time = np.full(self.size, _NOBODY), np.zeros(self.size, dtype=np.int64)
            self.program[at] = program
        else:
            before = self.program[at]
            self.program[at] = np.where((before == _NOBODY) | (before == program), program, _SEVERAL)
        self.time[at] = time


class _Memory:
    """The memory behind arguments that share it; elements are named by their first byte."""

    def __init__(self, name: str, storage: torch.UntypedStorage) -> None:
        self.name = name
        self.begin, self.size = storage.data_ptr(), storage.nbytes()
        self.accesses = {kind: _Accesses(self.size) for kind in _CONFLICTS}


class _Watch:
    """Sees every access of the launch in progress."""

    def __init__(self) -> None:
        self.races: dict[tuple[str, str, str], Race] = {}
        self.kernel = ""
        self.memories: list[_Memory] = []
        self.program = 0
        self.time = 0

    def begin(self, kernel: str, arguments: dict[str, Any]) -> None:
        """Start watching a launch: nothing of an earlier one can race with it."""
        self.kernel = kernel
        self.memories = [_Memory(name, storage) for name, storage in memories_of(arguments)]

    def order(self) -> None:
        """What follows comes after what a program did before: a barrier, or the next program."""
        self.time += 1

    def touch(self, does: str, pointers: Any, mask: Any, value: Any = None) -> None:
        """Report what nothing orders before this access (a key of _CONFLICTS; writes have a value), and note it."""
        for memory, at, lanes in self._lanes(pointers, mask):
            for did in _CONFLICTS[does]:
                by_others, by_itself = memory.accesses[did].unordered(at, self.program, self.time)
                if by_others:
                    self._report(memory, f"{does} what another program {did}")
                if by_itself:
                    self._report(memory, f"{does} what it {did} itself, with no barrier between")
            if value is not None and not (at[1:] > at[:-1]).all():  # ascending ones are different
                _, first, same = np.unique(at, return_index=True, return_inverse=True)
                values = np.broadcast_to(value.data, pointers.data.shape).ravel()[lanes]
                if values[first][same].tobytes() != values.tobytes():
                    self._report(memory, "writes two values to one place in one store")
            memory.accesses[does].note(at, self.program, self.time)

    def _lanes(self, pointers: Any, mask: Any) -> Iterator[tuple[_Memory, _Integers, _Integers]]:
        """For each memory touched: its elements, and the flat lanes of the block that touch them."""
        is_whole = mask.data.shape == pointers.data.shape
        lanes = np.flatnonzero(mask.data if is_whole else np.broadcast_to(mask.data, pointers.data.shape))
        addresses = pointers.data.ravel()[lanes].view(np.int64)
        left = len(lanes)
        for memory in self.memories if left else ():
            end = memory.begin + memory.size
            if memory.begin <= addresses.min() and addresses.max() < end:  # the usual case
                yield memory, addresses - memory.begin, lanes
                return
            inside = (addresses >= memory.begin) & (addresses < end)
            if inside.any():
                left -= int(inside.sum())
                yield memory, addresses[inside] - memory.begin, lanes[inside]
        assert not left, f"{self.kernel} touches memory of none of its arguments"

    def _report(self, memory: _Memory, fault: str) -> None:
        """Keep the first race of each kind in each kernel and argument: later ones repeat it."""
        race = Race(self.kernel, memory.name, fault, _kernel_line())
        self.races.setdefault((self.kernel, memory.name, fault), race)


def _kernel_line() -> str:
    """File and line of the kernel's code that is being interpreted."""
    frames = [frame for frame in traceback.extract_stack() if os.path.basename(frame.filename) != "races.py"]
    inside = [frame for frame in frames if "triton" not in frame.filename.split(os.sep)]
    return f"{os.path.basename(inside[-1].filename)}:{inside[-1].lineno}"


@contextmanager
def find_races() -> Iterator[list[Race]]:
    """Gives a list that holds, at the end of the block, the races of all launches inside: none from sound kernels.

    Launches must come from one thread. What no launch inside does with these shapes is not seen, nor is shared memory,
    which is the compiler's. Raises RuntimeError without Triton's interpreter.
    """
    if not INTERPRETED:
        raise RuntimeError("races are found in Triton's interpreter only; start Python with TRITON_INTERPRET=1")
    watch = _Watch()
    found: list[Race] = []
    builder, run = interpreter.interpreter_builder, interpreter.GridExecutor.__call__
    load, store, update = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    enter, barrier = builder.set_grid_idx, builder.create_barrier

    def watched_run(self: Any, *arguments: Any, **named: Any) -> Any:
        watch.begin(self.fn.__name__, dict(zip(self.arg_names, arguments)) | named)
        return run(self, *arguments, **named)

    def watched_enter(x: int, y: int, z: int) -> None:
        enter(x, y, z)
        width, height, _ = builder.grid_dim
        watch.program = x + width * (y + height * z)
        watch.order()

    def watched_barrier() -> Any:
        watch.order()
        return barrier()

    def watched_load(pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        watch.touch("reads", pointers, mask)
        return load(pointers, mask, *rest, **named)

    def watched_store(pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        watch.touch("writes", pointers, mask, value)
        return store(pointers, value, mask, *rest, **named)

    def watched_update(operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        watch.touch("updates", pointers, mask)
        return update(operation, pointers, value, mask, *rest, **named)

    methods: dict[str, Callable[..., Any]] = {
        "create_masked_load": watched_load,
        "create_masked_store": watched_store,
        "create_atomic_rmw": watched_update,
        "set_grid_idx": watched_enter,
        "create_barrier": watched_barrier,
    }
    with replace_methods(builder, methods), replace_methods(interpreter.GridExecutor, {"__call__": watched_run}):
        yield found
    found += watch.races.values()
