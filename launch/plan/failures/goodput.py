"""Goodput: which part of the days trains, where nodes fail so often, and how often to save.

A failure costs the work since the last checkpoint that stands, and the time to recover: someone notices, all processes
start again, communicators form, every rank reads its checkpoint, and the first steps are slow. A checkpoint costs the copy
that the step waits for; the rest is written while training continues. With U seconds of training, M between failures, s
per copy, I between checkpoints, w until one stands and R to recover, the run takes W seconds with

    W = U (1 + s / I) + (W / M) (I / 2 + w + R)

and goodput is U / W. The best interval is near sqrt(2 s M) (Young 1974, "A first order approximation to the optimum
checkpoint interval"; Daly 2006, "A higher order estimate of the optimum checkpoint interval for restart dumps"), and at
least the time until one checkpoint stands. What a failure takes is assumed where the table says so: no cluster of that size
was measured. For the rate: Llama 3 met 419 unexpected interruptions in 54 days on 16,384 H100 (arXiv 2407.21783, section
3.3.4), 0.47 per day and 1,000 GPUs.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from amfm.launch.plan.estimate import Assumptions, Estimate
from amfm.launch.plan.failures.replicas import HASHED_BYTES_PER_SECOND, estimate_replicas, saved_bytes_by_stage
from amfm.launch.plan.hardware import Hardware
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.monitor.beats import SILENT_SECONDS

DAY_SECONDS = 86_400.0
STAGED_BYTES_PER_SECOND = 5e9  # of one rank, into memory that is not pinned
NODE_STORAGE_BYTES_PER_SECOND = 2e9
MOST_STORAGE_BYTES_PER_SECOND = 100e9
CRASH_SECONDS = 10.0
# Of failures; the others end a process, which is noticed immediately. Silent: a node is gone, or a rank stopped, without a word.
SILENT_SHARE, HANG_SHARE = 0.05, 0.05
START_SECONDS = 45.0
COMMUNICATOR_SECONDS, COMMUNICATOR_SECONDS_PER_RANK = 20.0, 0.006
FIRST_STEPS_SECONDS = 30.0


@dataclass(frozen=True)
class Recovery:
    """Seconds that pass after a failure until training continues, by part."""

    notice: float
    start: float
    connect: float
    load: float
    first_steps: float

    def total(self) -> float:
        """Seconds of all parts."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Cadence:
    """Goodput where training is saved every N steps: by checkpoints, or by replicas in memory next to them."""

    every_steps: int
    lost_seconds: float
    goodput: float


@dataclass(frozen=True)
class Goodput:
    """What failures cost a run in its first stage's layout; see the formulas above.

    `save_seconds`: until a checkpoint stands; `stall_seconds`: of it, what the step waits for. `configured`: None if the
    run saves only at its end. `replicas`: None if it writes none.
    """

    failures_per_day: float
    storage_bytes_per_second: float
    checkpoint_bytes: float
    stall_seconds: float
    save_seconds: float
    recovery: Recovery
    configured: Cadence | None
    best: Cadence
    replicas: Cadence | None

    def expected(self) -> Cadence:
        """The cadence that the configuration has, replicas if it writes them; without any, the best one."""
        return self.replicas or self.configured or self.best

    def to_json(self) -> dict[str, Any]:
        """The fields, nested, with the sum of the recovery."""
        return asdict(self) | {"recovery_seconds": self.recovery.total()}


def hang_seconds(config: RunConfig) -> float:
    """Until a rank that lives and gets no further is noticed: by its own watch, or by a collective's limit."""
    return config.launch.heartbeat_seconds or config.train.timeout_seconds


def silent_seconds(config: RunConfig) -> float:
    """Until a rank without a sign of life is noticed: by its neighbours, who look only where ranks are watched."""
    watch = config.launch.heartbeat_seconds
    return hang_seconds(config) if watch is None else min(SILENT_SECONDS, watch)


def estimate_goodput(
    config: RunConfig,
    item: Estimate,
    hardware: Hardware,
    assumptions: Assumptions,
) -> Goodput | None:
    """Goodput of a run; None if no number of failures is assumed. Raises ValueError if the run would never end."""
    failures_per_day = assumptions.failures_per_day
    if failures_per_day is None:
        return None
    ranks, step = item.layout.ranks, item.step.total()
    nodes = math.ceil(ranks / hardware.gpus_per_node)
    storage = assumptions.storage_bytes_per_second or min(
        nodes * NODE_STORAGE_BYTES_PER_SECOND, MOST_STORAGE_BYTES_PER_SECOND
    )
    by_stage = saved_bytes_by_stage(config, item.layout)
    rank_bytes, total_bytes = max(by_stage), sum(by_stage) / len(by_stage) * ranks
    stall = rank_bytes / STAGED_BYTES_PER_SECOND
    save = max(rank_bytes / HASHED_BYTES_PER_SECOND, total_bytes / storage)
    between = DAY_SECONDS / failures_per_day
    recovery = Recovery(
        notice=CRASH_SECONDS + SILENT_SHARE * silent_seconds(config) + HANG_SHARE * hang_seconds(config),
        start=START_SECONDS,
        connect=COMMUNICATOR_SECONDS + COMMUNICATOR_SECONDS_PER_RANK * ranks,
        # Verified, then restored: read twice.
        load=save + total_bytes / storage,
        first_steps=FIRST_STEPS_SECONDS,
    )

    def at(every_steps: int, until_it_stands: float, waits: float) -> Cadence:
        lost = every_steps * step / 2 + until_it_stands
        trains = 1 - (lost + recovery.total()) / between
        return Cadence(every_steps, lost, max(0.0, trains) / (1 + waits / (every_steps * step)))

    replicas = estimate_replicas(config, item, hardware)
    best_seconds = max(math.sqrt(2 * stall * between), save)
    every, copies = config.train.checkpoint_every_steps, config.train.replica_every_steps
    found = Goodput(
        failures_per_day=failures_per_day,
        storage_bytes_per_second=storage,
        checkpoint_bytes=total_bytes,
        stall_seconds=stall,
        save_seconds=save,
        recovery=recovery,
        configured=None if every is None else at(every, save, stall),
        best=at(max(1, round(best_seconds / step)), save, stall),
        replicas=None if copies is None or replicas is None else at(copies, replicas.seconds, stall),
    )
    if not found.expected().goodput:
        cost = found.expected().lost_seconds + recovery.total()
        raise ValueError(
            f"--failures-per-day {failures_per_day:g}: the run would never end, since a failure costs {cost:,.0f} s and "
            f"the next comes after {between:,.0f}; save more often (best: every {found.best.every_steps} steps), or use "
            "faster storage"
        )
    return found
