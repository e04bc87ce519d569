"""Exchange of small Python objects between ranks, on the default process group or on one of its own.

For names, reports and errors, which are pickled; tensors go through their own collectives (parallel.py). Objects are sent over a
tree. `raise_together` is how a failure of one rank becomes an error of all: if only one rank raised, it would
leave the others waiting.

A tree of ranks over which objects are joined upwards and handed down, so that no rank talks to many others.

A gather to rank 0 opens a socket to each of 16,383 others, above what a process may have, and an all-gather of names sends
every rank what all others know. In the tree, eight consecutive ranks are a block (a node of most machines) whose first rank
talks to the other seven, and first ranks have FAN_OUT first ranks below them. What is joined on the way is merged at each rank,
so that what many say alike is sent once. With 16,384 ranks a message passes five others at most, and a rank has 24 peers.

`up` and `down` need no more than a way to send bytes to a rank and to receive them, so a test runs them for any number of ranks
without processes.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

BLOCK = 8
FAN_OUT = 16


class Post(Protocol):
    """Carries bytes between ranks, in order."""

    def send(self, content: bytes, to: int) -> None:
        """Send to a rank."""
        ...

    def receive(self, source: int) -> bytes:
        """Wait for what a rank sends."""
        ...


@dataclass(frozen=True)
class RankTree:
    """Who is above and below whom among `world_size` ranks; rank 0 is the root."""

    world_size: int

    def parent(self, rank: int) -> int | None:
        """The rank above; none for rank 0."""
        block, place = divmod(rank, BLOCK)
        if place:
            return block * BLOCK
        return (block - 1) // FAN_OUT * BLOCK if block else None

    def children(self, rank: int) -> list[int]:
        """The ranks below, in rank order."""
        block, place = divmod(rank, BLOCK)
        if place:
            return []
        mates = range(rank + 1, min(rank + BLOCK, self.world_size))
        below = range(block * FAN_OUT + 1, block * FAN_OUT + FAN_OUT + 1)
        return [*mates, *(first * BLOCK for first in below if first * BLOCK < self.world_size)]


def up(tree: RankTree, rank: int, post: Post, value: T, merge: Callable[[T, T], T]) -> T:
    """Join the values of a rank and of all below it, and send them on; whole at rank 0. All ranks must call it.

    merge: gets what stands already first; must not care for the order otherwise.
    """
    for child in tree.children(rank):
        value = merge(value, pickle.loads(post.receive(child)))  # noqa: S301 - of a rank of this run
    parent = tree.parent(rank)
    if parent is not None:
        post.send(pickle.dumps(value), parent)
    return value


def down(tree: RankTree, rank: int, post: Post, value: T) -> T:
    """Hand rank 0's value to all ranks; what the others give is ignored. All ranks must call it."""
    content = relay(tree, rank, post, pickle.dumps(value) if rank == 0 else b"")
    return value if rank == 0 else pickle.loads(content)  # noqa: S301 - of rank 0 of this run


def relay(tree: RankTree, rank: int, post: Post, content: bytes) -> bytes:
    """Hand rank 0's bytes to all ranks, which pass them on unread."""
    parent = tree.parent(rank)
    if parent is not None:
        content = post.receive(parent)
    for child in tree.children(rank):
        post.send(content, child)
    return content


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
        """The same only on rank 0; None elsewhere."""
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
