"""Goodput against failures that were drawn, the best interval against all others, and what stops a run for good."""

from __future__ import annotations

import random

import pytest

from amfm.launch.plan.estimate import Assumptions
from amfm.launch.plan.failures.goodput import Goodput, estimate_goodput
from tests.launch.plan.presets import H100, plan_of

RANKS = 128


def goodput_of(failures_per_day: float, *overrides: str, storage: float = 20e9) -> Goodput:
    plan = plan_of("nemotron3_nano_30b", *overrides, ranks=RANKS)
    assumptions = Assumptions(failures_per_day=failures_per_day, storage_bytes_per_second=storage)
    found = estimate_goodput(plan.config, plan.own, H100, assumptions)
    assert found is not None
    return found


def drawn_goodput(found: Goodput, every_seconds: float, days: float) -> float:
    """Which part of this many days trains, where failures come at random: checkpoints that do not yet stand do not count."""
    draws = random.Random(1)
    rate = found.failures_per_day / 86_400
    clock, trained = 0.0, 0.0
    while clock < days * 86_400:
        life = draws.expovariate(rate)
        # A failure may meet a run that still recovers from the one before.
        alive = max(0.0, life - found.recovery.total())
        whole, rest = divmod(alive, every_seconds + found.stall_seconds)
        # The newest checkpoint counts where it stood before the end.
        saved = whole - (1 if rest < found.save_seconds else 0)
        trained += max(0.0, saved) * every_seconds
        clock += life
    return trained / clock


def test_goodput_is_that_of_failures_which_were_drawn() -> None:
    found = goodput_of(6.0, "train.checkpoint_every_steps=50")
    assert found.configured is not None
    seconds = 2 * (found.configured.lost_seconds - found.save_seconds)
    assert found.configured.goodput == pytest.approx(drawn_goodput(found, seconds, 20_000), abs=0.003)


def test_the_best_interval_beats_half_and_twice_of_it() -> None:
    found = goodput_of(6.0)
    others = [
        goodput_of(6.0, f"train.checkpoint_every_steps={round(found.best.every_steps * factor)}").configured
        for factor in (0.5, 2.0)
    ]
    assert all(other is not None and other.goodput < found.best.goodput for other in others)


def test_replicas_lose_less_than_checkpoints_and_a_run_that_can_not_end_is_refused() -> None:
    keys = ("train.checkpoint_every_steps=2000", "train.replica_every_steps=20")
    found = goodput_of(4.0, *keys)
    assert found.replicas is not None and found.configured is not None
    assert found.expected() == found.replicas and found.replicas.goodput > found.configured.goodput
    with pytest.raises(ValueError, match=r"--failures-per-day 900: the run would never end, .*best: every \d+ steps"):
        goodput_of(900.0, *keys)


@pytest.mark.parametrize(
    ("heartbeat", "seconds"), [("900", 10 + 2.25 + 45), ("20", 10 + 1 + 1), ("null", 10 + 60 + 60)]
)
def test_a_silent_node_is_noticed_by_its_neighbours_where_ranks_are_watched(heartbeat: str, seconds: float) -> None:
    found = goodput_of(1.0, f"launch.heartbeat_seconds={heartbeat}", "train.timeout_seconds=1200")
    assert found.recovery.notice == pytest.approx(seconds)


def test_nobody_asked_costs_nothing() -> None:
    assert plan_of("tiny_cpu", ranks=1).goodput is None
