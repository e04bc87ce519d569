"""Measure between ranks: bandwidth of an all-reduce and of single links, and the skew of hosts' clocks.

How it works: links are tested in rounds of disjoint pairs (`plan_links`), both directions at once, so that the number
of rounds does not grow with the cluster: three within hosts and three between them. All pairs would take the square of
the ranks; a ring still uses every rank's own way out of its host. Times are medians after warm-up, and of a pair's two
ends the slower counts. Clocks are compared by messages to rank 0 and back, as NTP does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

WARM_UPS, REPEATS = 2, 5
PINGS = 8
# Large enough for a GPU's full rate; on CPU small enough for a slow network.
CUDA_BYTES, CPU_BYTES = 256 * 2**20, 8 * 2**20

Kind = Literal["within hosts", "between hosts"]


@dataclass(frozen=True)
class Link:
    """Bandwidth between a pair of ranks in each direction, both used at the same time, in 1e9 bytes per second."""

    first: int
    second: int
    kind: Kind
    gigabytes_per_second: float


@dataclass(frozen=True)
class Skew:
    """Seconds that a clock is ahead of rank 0's, and the largest error that this may have."""

    seconds: float
    error: float


def gather(value: Any) -> list[Any]:
    """Every rank's picklable value, in rank order. Every rank must call this."""
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def group_by_host(hosts: Sequence[str]) -> dict[str, list[int]]:
    """Ranks of each host, in the order of each host's first rank."""
    groups: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        groups.setdefault(host, []).append(rank)
    return groups


def plan_links(hosts: Sequence[str]) -> list[tuple[Kind, list[tuple[int, int]]]]:
    """Rounds of disjoint pairs of ranks to measure: a ring within each host, and rings over the hosts.

    Ranks of the same place in their hosts form a ring over the hosts, so every rank's own way out of its host is used
    once on each side. The pairs of a round run at the same time.
    """
    groups = list(group_by_host(hosts).values())
    places = range(max(len(group) for group in groups))
    across = [[group[place] for group in groups if place < len(group)] for place in places]
    kinds: list[tuple[Kind, list[list[int]]]] = [("within hosts", groups), ("between hosts", across)]
    rounds = []
    for kind, rings in kinds:
        for number in range(3):
            pairs = [pair for ring in rings for pair in ring_rounds(ring)[number]]
            if pairs:
                rounds.append((kind, pairs))
    return rounds


def ring_rounds(ring: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Neighbours of a ring as three rounds in which no rank appears twice; the third is for odd rings."""
    links = [(ring[place], ring[(place + 1) % len(ring)]) for place in range(len(ring))]
    if len(ring) < 3:
        links = links[: len(ring) - 1]
    last = [links.pop()] if len(links) > 1 and len(links) % 2 else []
    return [links[::2], links[1::2], last]


def link_tensor(device: torch.device) -> Tensor:
    """Message of zeros that links are timed with, uint8, of a size that suits the device."""
    return torch.zeros(CUDA_BYTES if device.type == "cuda" else CPU_BYTES, dtype=torch.uint8, device=device)


def time_median(work: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a piece of work over `REPEATS` runs after warm-up, the device synchronized each time."""
    seconds = []
    for _ in range(WARM_UPS + REPEATS):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM_UPS:])


def measure_all_reduce(device: torch.device) -> float:
    """Bus bandwidth of an all-reduce over all ranks, in 1e9 bytes per second; the same on every rank.

    Each rank of a ring sends 2 (n - 1) / n of the tensor; the slowest rank's median counts. Every rank must call this,
    and there must be two at least.
    """
    num_ranks = torch.distributed.get_world_size()
    tensor = link_tensor(device)
    # The slowest rank decides how long a collective takes for all.
    seconds = max(gather(time_median(lambda: torch.distributed.all_reduce(tensor), device)))
    return float(2 * (num_ranks - 1) / num_ranks * tensor.numel() / seconds / 1e9)


def measure_links(hosts: Sequence[str], device: torch.device) -> list[Link]:
    """Bandwidth of every link of `plan_links`; the same on every rank. Every rank must call this.

    Pairs of a round exchange at the same time; a gather after each round keeps rounds apart.
    """
    rank = torch.distributed.get_rank()
    out, into = link_tensor(device), link_tensor(device)
    found: list[Link] = []
    for kind, pairs in plan_links(hosts):
        mine = next((pair for pair in pairs if rank in pair), None)
        link = None
        if mine is not None:
            other = mine[1] if rank == mine[0] else mine[0]
            seconds = time_median(partial(exchange, out, into, other), device)
            link = Link(*mine, kind, out.numel() / seconds / 1e9)
        # Gathering also keeps rounds apart. Of the two ends' times the longer one counts.
        ends: dict[tuple[int, int], Link] = {}
        for end in gather(link):
            if end is not None:
                slower = ends.get((end.first, end.second), end)
                ends[end.first, end.second] = min(end, slower, key=lambda item: item.gigabytes_per_second)
        found += ends.values()
    return found


def exchange(out: Tensor, into: Tensor, other: int) -> None:
    """Send `out` to another rank and receive `into` from it at the same time; that rank must call this too."""
    # As one batch: two blocking calls, each side sending first, would wait for each other.
    sends = [
        torch.distributed.P2POp(torch.distributed.isend, out, other),
        torch.distributed.P2POp(torch.distributed.irecv, into, other),
    ]
    for work in torch.distributed.batch_isend_irecv(sends):
        work.wait()


def measure_skews(hosts: Sequence[str]) -> dict[str, Skew]:
    """Clock skew of every host against rank 0's; the same on every rank. Every rank must call this.

    Rank 0 pings the first rank of each other host, one after the other.
    """
    rank = torch.distributed.get_rank()
    leaders = {host: ranks[0] for host, ranks in group_by_host(hosts).items()}
    skews = {hosts[0]: Skew(0.0, 0.0)}
    for host, leader in leaders.items():
        if leader == 0:
            continue
        if rank == 0:
            skews[host] = estimate_skew([ping(leader) for _ in range(PINGS)])
        elif rank == leader:
            for _ in range(PINGS):
                answer_ping()
    answer: dict[str, Skew] = gather(skews)[0]
    return answer


def ping(other: int) -> tuple[float, float, float]:
    """(before, other, after) in seconds: our clock, the other's, and ours again around one message."""
    stamp = torch.zeros(1, dtype=torch.int64)
    before = time.time_ns()
    torch.distributed.send(stamp, other)
    torch.distributed.recv(stamp, other)
    after = time.time_ns()
    return before / 1e9, int(stamp) / 1e9, after / 1e9


def answer_ping() -> None:
    """Answer rank 0's ping with this host's clock."""
    stamp = torch.zeros(1, dtype=torch.int64)
    torch.distributed.recv(stamp, 0)
    stamp.fill_(time.time_ns())
    torch.distributed.send(stamp, 0)


def estimate_skew(pings: Sequence[tuple[float, float, float]]) -> Skew:
    """Skew of the other clock from (before, other, after) of several pings; the quickest has the smallest error.

    Source: Mills 1991, Internet Time Synchronization (half of the delay bounds the error).
    """
    before, other, after = min(pings, key=lambda item: item[2] - item[0])
    return Skew(other - (before + after) / 2, (after - before) / 2)
