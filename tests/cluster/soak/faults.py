"""Which faults strike a cluster, and in which order: drawn only from the seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from tests.cluster.cluster import FAKE_CLOCK

KINDS = (
    "rank killed",
    "rank stopped for good",
    "rank stopped for 10 s",
    "newest checkpoint damaged, rank killed",
    "power of a node lost",
    "power of the batch host lost",
    "link of a node cut for 10 s",
    "link of a node cut for a minute",
    "slow link that loses packets for a minute",
    "controller killed, back after 40 s",
    "controller killed and a rank too",
    "slurmd of a node killed, started again",
    "disk full for a minute",
    "submitted twice",
    "launcher killed",
    "SIGTERM to the launcher alone",
    "SIGUSR1 to the ranks",
    "job requeued by hand",
    "clock of a node 20 s ahead",
    "clock of a node 300 s ahead",
)


@dataclass(frozen=True)
class Fault:
    """One strike. `draw`: in [0, 1), for which node or rank it is."""

    kind: str
    draw: float


def draw_faults(seed: int) -> Iterator[Fault]:
    """Draw faults without end: every kind once, in an order of the seed, then every kind in another order."""
    source = random.Random(f"cluster soak {seed}")
    kinds = [kind for kind in KINDS if FAKE_CLOCK or "clock" not in kind]
    for _ in itertools.count():
        for kind in source.sample(kinds, len(kinds)):
            yield Fault(kind, source.random())
