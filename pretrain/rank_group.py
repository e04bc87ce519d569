"""Exchange of small Python objects between ranks, on the default process group or on one of its own.

For names, reports and errors, which are pickled; tensors go through their own collectives (parallel.py).
`raise_together` is how a failure of one rank becomes an error of all: a rank that raised alone would leave the others
waiting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class RankGroup:
    """The ranks that exchange objects; all of them must call every method, in the same order. One rank talks to nobody.

    `group`: the process group that carries the messages; None is the default one, whose messages then mix with
    training's.
    """

    rank: int
    world_size: int
    group: dist.ProcessGroup | None = None

    def all_gather(self, value: Any) -> list[Any]:
        """Gather every rank's picklable value, in rank order, on all ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Gather every rank's picklable value, in rank order, on rank 0; an empty list elsewhere."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self.group)
        return values or []

    def broadcast(self, value: Any) -> Any:
        """Send rank 0's picklable value to all ranks; what the others pass is ignored."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def raise_together(self, problem: str | None, doing: str) -> None:
        """Raise RuntimeError on every rank when any rank has a problem, naming rank and problem."""
        problems = [(rank, text) for rank, text in enumerate(self.all_gather(problem)) if text is not None]
        if problems:
            raise RuntimeError(f"{doing}: " + "; ".join(f"rank {rank}: {text}" for rank, text in problems))
