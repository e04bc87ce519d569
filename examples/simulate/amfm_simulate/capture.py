"""Whether CUDA graphs could hold blocks: what a pass of a block asks of the host, and what it launches otherwise a second time.

A graph replays one list of launches with the scalars, sizes and addresses that it was captured with. So a kind of block can be
captured if its passes read nothing on the host, and launch the same kernels with the same grids, scalars and addresses in a step
whose rows hold other documents. The simulated rank takes two steps, of which the first has more documents per row than the
second; of every kind of block the launches of all its passes are compared in order. Of addresses: what a pass allocates, the
same sizes in the same order, gets the same ones from a graph's own memory; what it is given (arguments, gradients of its
results) is copied to the graph's inputs; all else, such as weights, must be the memory of the step before. What is not seen:
whether libraries' own kernels can be captured.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

MOST_NAMED = 6  # differences of a kind of block
MEMORY = re.compile(r" in memory \S+ of ([^,\]]+)")  # as `other_memory` says it


Launch = tuple[str, tuple[str, ...]]  # a kernel or operation, and what a graph would hold of its arguments and results


class CaptureCheck:
    """Launches of two steps by kind of block and pass, compared as they come."""

    def __init__(self) -> None:
        self.step = 0
        self.first: dict[tuple[str, str], list[Launch]] = {}
        self.places: dict[tuple[str, str], int] = {}
        self.reads: dict[tuple[str, str], dict[str, None]] = {}
        self.changed: dict[tuple[str, str], dict[str, None]] = {}

    def begin_step(self) -> None:
        """The next step begins."""
        self.step += 1

    def read(self, kind: str, which: str, line: str) -> None:
        """Note that the host waits for the device in a pass of a block."""
        if self.step in (1, 2):
            self.reads.setdefault((kind, which), {})[line] = None

    def launch(
        self,
        kind: str,
        which: str,
        name: str,
        given: Iterable[Any],
        results: Any,
        other_memory: Callable[[Tensor], str],
    ) -> None:
        """Note a launch: its scalars, sizes of tensors among them, and of its results, which are allocated for it.

        `other_memory` says where a tensor is that its pass neither makes nor is given: " in memory ADDRESS of LINE".
        """
        key = kind, which
        entry = name, (*(describe(value, other_memory) for value in given), *describe_results(results))
        if self.step == 1:
            self.first.setdefault(key, []).append(entry)
        elif self.step == 2:
            place = self.places.get(key, 0)
            self.places[key] = place + 1
            known = self.first.get(key, [])
            before = known[place] if place < len(known) else ("nothing", ())
            if before != entry and len(self.changed.setdefault(key, {})) < MOST_NAMED:
                self.changed[key][describe_change(before, entry)] = None

    def found(self) -> dict[str, dict[str, Any]]:
        """By kind of block, for each of its passes: launches, reads of the host, and what changed."""
        kinds: dict[str, dict[str, Any]] = {}
        for key in dict.fromkeys([*self.first, *self.changed, *self.reads]):
            entries, (kind, which) = self.first.get(key, []), key
            changed = list(self.changed.get(key, {}))
            if self.places.get(key, 0) < len(entries):
                changed.append(f"{len(entries)} launches -> {self.places.get(key, 0)}")
            reads = list(self.reads.get(key, {}))
            kinds.setdefault(kind, {})[which] = {"launches": len(entries), "host_reads": reads, "changed": changed}
        return kinds


def describe(value: Any, other_memory: Callable[[Tensor], str]) -> str:
    """What a graph holds of an argument: shape, dtype and other memory of a tensor, or the value."""
    if isinstance(value, Tensor):
        return f"{describe_size(value)}{other_memory(value)}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(describe(one, other_memory) for one in value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe_results(results: Any) -> list[str]:
    """Sizes that are allocated for results on the device."""
    return [describe_size(one) for one in tree_leaves(results) if isinstance(one, Tensor)]


def describe_size(tensor: Tensor) -> str:
    """Dtype and shape."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def describe_change(before: Launch, after: Launch) -> str:
    """Two launches at the same place of a pass: other kernels, the arguments and sizes in which one differs, or its memory."""
    (name, given), (other, later) = before, after
    if name != other or len(given) != len(later):
        return f"{name} -> {other}"
    pairs = [(one, two) for one, two in zip(given, later) if MEMORY.sub("", one) != MEMORY.sub("", two)]
    if not pairs:
        lines = [line for one, two in zip(given, later) if one != two for line in MEMORY.findall(f"{one}, {two}")]
        return f"{name}: other memory of {', '.join(dict.fromkeys(lines))}"
    was, now = (", ".join(values) for values in zip(*pairs))
    return f"{name}: {was} -> {now}"
