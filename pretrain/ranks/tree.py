"""A tree of ranks over which objects are joined upwards and handed down, so that no rank talks to many others.

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
from typing import Protocol, TypeVar

BLOCK = 8
FAN_OUT = 16
T = TypeVar("T")


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
