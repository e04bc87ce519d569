"""Every communicator is made and timed at the start, by small sums.

Groups of ranks are lazy: connections and buffers come with the first collective. Without this, some of them would come in the first
step of the optimizer, when memory is full, and a rank or link that is missing there looks like any other hang. Made before the model,
a missing one ends the start by its name, and one that is much slower than the others is reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from amfm.model.parallel.groups import AXES
from amfm.pretrain.parallel import Parallel
from amfm.pretrain.ranks.group import RankGroup

Communicator = tuple[str, tuple[int, ...]]  # its axis, and the global ranks in it
Seconds = dict[Communicator, float]
ROUNDS = 3  # of which the fastest counts: a host that pauses once is not a slow link
SLOW_RATIO, SLOW_SECONDS = 10.0, 0.25  # above the median of all, and at least


def make_communicators(parallel: Parallel, timeout_seconds: float) -> list[str]:
    """Make and time the communicators of a layout; returns what is slow, in words, on all ranks. Every rank must call this.

    Raises RuntimeError if one does not answer within the time, with its axis and ranks.
    """
    own: Seconds = {}
    for axis, group in list_communicators(parallel):
        ranks = tuple(dist.get_process_group_ranks(group))
        seconds = [time_sum((axis, ranks), group, parallel.device, timeout_seconds) for _ in range(1 + ROUNDS)]
        own[axis, ranks] = min(seconds[1:])

    def slowest(known: Seconds, more: Seconds) -> Seconds:
        return {**known, **{name: max(value, known.get(name, 0.0)) for name, value in more.items()}}

    joined: Seconds = RankGroup(parallel.rank, parallel.world_size).merge(own, slowest)
    return describe_slow(joined)


def list_communicators(parallel: Parallel) -> Iterator[tuple[str, Any]]:
    """Yield this rank's groups of more than one rank with their axes, the whole world first; in one order on all ranks."""
    if parallel.world_size == 1:
        return
    yield "all", dist.group.WORLD
    seen = set()
    for axis in AXES:
        group = getattr(parallel.groups, axis)
        if group is not None and group.size() > 1 and id(group) not in seen:
            seen.add(id(group))
            yield axis, group


def time_sum(name: Communicator, group: Any, device: torch.device, timeout_seconds: float) -> float:
    """Seconds of a sum of one number over a communicator. Every rank of it must call this."""
    began = time.perf_counter()
    number = torch.ones(1, device=device)
    try:
        dist.all_reduce(number, group=group, async_op=True).wait(timedelta(seconds=timeout_seconds))
        total = int(number)
    except RuntimeError as error:
        raise RuntimeError(
            f"{describe(name)} does not answer: a sum of one number was not done in {timeout_seconds:g} s "
            f"(train.timeout_seconds) or failed ({str(error).splitlines()[0]}); see whether all of its ranks run, and "
            "whether their links work, with amfm launch --doctor"
        ) from error
    if total != len(name[1]):
        raise RuntimeError(
            f"{describe(name)}: ones of {len(name[1])} ranks add up to {total}; a link or library is broken"
        )
    return time.perf_counter() - began


def describe_slow(seconds: Seconds) -> list[str]:
    """Say which communicators take much longer than most."""
    if not seconds:
        return []
    median = statistics.median(seconds.values())
    limit = max(SLOW_RATIO * median, SLOW_SECONDS)
    return [
        f"{describe(name)} is slow: a sum of one number takes {value:.2g} s there, {median:.2g} s in most"
        for name, value in sorted(seconds.items())
        if value > limit
    ]


def describe(name: Communicator) -> str:
    """A communicator in words."""
    axis, ranks = name
    return f"the communicator {axis} of ranks {', '.join(map(str, ranks[:8]))}{', ...' if len(ranks) > 8 else ''}"
