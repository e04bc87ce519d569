"""Exchange of small Python objects between ranks, on the default process group or on one of its own.

For names, reports and errors, which are pickled; tensors go through their own collectives (parallel.py). Objects are sent over a
tree (tree.py). `raise_together` is how a failure of one rank becomes an error of all: a rank that raised alone would
leave the others waiting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from amfm.pretrain.ranks.tree import RankTree, down, up

T = TypeVar("T")


@dataclass(frozen=True)
class GroupPost:
    """Sends and receives bytes as CPU tensors of a process group."""

    group: dist.ProcessGroup | None

    def send(self, content: bytes, to: int) -> None:
        """Send the length, then the bytes."""
        dist.send(torch.tensor([len(content)]), to, group=self.group)
        dist.send(torch.frombuffer(bytearray(content), dtype=torch.uint8), to, group=self.group)

    def receive(self, source: int) -> bytes:
        """Receive the length, then the bytes."""
        length = torch.zeros(1, dtype=torch.int64)
        dist.recv(length, source, group=self.group)
        content = torch.empty(int(length), dtype=torch.uint8)
        dist.recv(content, source, group=self.group)
        return content.numpy().tobytes()


@dataclass(frozen=True)
class RankGroup:
    """The ranks that exchange objects; all of them must call every method, in the same order. One rank talks to no one.

    `group`: the process group that carries the messages; None is the default one, whose messages then mix with
    training's.
    """

    rank: int
    world_size: int
    group: dist.ProcessGroup | None = None

    def all_gather(self, value: T) -> list[T]:
        """Gather every rank's picklable value, in rank order, on all ranks; for small values that differ by rank."""
        return self.broadcast(self.gather(value))

    def gather(self, value: T) -> list[T]:
        """Gather every rank's picklable value, in rank order, on rank 0; an empty list elsewhere."""
        values = self._up({self.rank: value}, lambda known, more: known | more)
        return [values[rank] for rank in range(self.world_size)] if self.rank == 0 else []

    def collect(self, value: T | None) -> dict[int, T]:
        """Collect the values of those ranks that have one, by rank, on all ranks: for what few have to say."""
        own = {} if value is None else {self.rank: value}
        values = self.merge(own, lambda known, more: known | more)
        return {rank: values[rank] for rank in sorted(values)}

    def merge(self, value: T, merge: Callable[[T, T], T]) -> T:
        """Join the picklable values of all ranks, two at a time on the way to rank 0; the result is on all ranks."""
        return self.broadcast(self._up(value, merge))

    def merge_to_first(self, value: T, merge: Callable[[T, T], T]) -> T | None:
        """The same on rank 0 alone; None elsewhere."""
        joined = self._up(value, merge)
        return joined if self.rank == 0 else None

    def broadcast(self, value: Any) -> Any:
        """Send rank 0's picklable value to all ranks; what the others pass is ignored."""
        if self.world_size == 1:
            return value
        return down(RankTree(self.world_size), self.rank, GroupPost(self.group), value)

    def raise_together(self, problem: str | None, doing: str) -> None:
        """Raise RuntimeError on every rank when any rank has a problem, naming rank and problem."""
        problems = self.collect(problem)
        if problems:
            raise RuntimeError(f"{doing}: " + "; ".join(f"rank {rank}: {text}" for rank, text in problems.items()))

    def _up(self, value: T, merge: Callable[[T, T], T]) -> T:
        """Join values on the way to rank 0."""
        if self.world_size == 1:
            return value
        return up(RankTree(self.world_size), self.rank, GroupPost(self.group), value, merge)
