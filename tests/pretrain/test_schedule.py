"""Shapes of the learning rate."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from amfm.pretrain.config.schema import ScheduleConfig
from amfm.pretrain.stages import learning_rate

PEAK, STEPS = 2.0, 100


def rates(**settings: object) -> list[float]:
    config = ScheduleConfig.model_validate({"warmup_steps": 0, **settings})
    return [learning_rate(step, config, peak=PEAK, total_steps=STEPS) for step in range(1, STEPS + 1)]


def test_inverse_square_root_falls_from_the_peak_and_stops_at_the_floor() -> None:
    curve = rates(kind="inverse_sqrt", warmup_steps=4, min_ratio=0.25)
    assert curve[3] == PEAK
    assert curve[15] == pytest.approx(PEAK / 2)
    assert curve[63:] == pytest.approx([PEAK / 4] * 37)


@pytest.mark.parametrize("kind", ["wsd", "cosine", "constant", "inverse_sqrt"])
def test_warmup_rises_linearly_to_the_peak(kind: str) -> None:
    assert rates(kind=kind, warmup_steps=10)[:10] == pytest.approx([PEAK * n / 10 for n in range(1, 11)])


def test_warmup_takes_a_twentieth_by_default() -> None:
    assert rates(warmup_steps=None)[:5] == pytest.approx([PEAK * n / 5 for n in range(1, 6)])


def test_wsd_is_flat_then_falls_to_the_floor() -> None:
    curve = rates(kind="wsd", warmup_steps=10, decay_steps=20, min_ratio=0.1)
    assert curve[9:80] == [PEAK] * 71
    assert curve[80:] == pytest.approx([PEAK * (1 - 0.9 * n / 20) for n in range(1, 21)])


def test_wsd_decays_over_a_fifth_by_default() -> None:
    curve = rates(kind="wsd", min_ratio=0.0)
    assert curve[79] == PEAK and curve[80] < PEAK and curve[-1] == 0.0


def test_wsd_decay_never_reaches_into_a_long_warmup() -> None:
    curve = rates(kind="wsd", warmup_steps=95)
    assert curve[94] == PEAK and curve[-1] == pytest.approx(0.1 * PEAK)


@pytest.mark.parametrize(
    ("shape", "middle"),
    [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5)), ("cosine", 0.5), ("exponential", math.sqrt(2) - 1)],
    ids=str,
)
def test_decay_shapes_at_their_middle_and_end(shape: str, middle: float) -> None:
    curve = rates(kind="wsd", decay_steps=50, decay_shape=shape, min_ratio=0.0)
    assert curve[74] == pytest.approx(PEAK * middle)
    assert curve[-1] == pytest.approx(0.0, abs=1e-12)
    assert all(later <= earlier for earlier, later in pairwise(curve))


def test_cosine_falls_from_the_end_of_warmup() -> None:
    curve = rates(kind="cosine", warmup_steps=20, min_ratio=0.25)
    assert curve[19] == PEAK
    assert curve[59] == pytest.approx(PEAK * (0.25 + 0.75 * 0.5))
    assert curve[-1] == pytest.approx(0.25 * PEAK)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["linear", "exponential", "minus_sqrt", "cosine"])
@pytest.mark.parametrize("style", ["WSD", "cosine"])
def test_rates_in_samples_are_megatrons_one_iteration_later(style: str, shape: str) -> None:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    batch, warmup, decay, end = 3072, 50_000, 100_000, 250_000  # samples: 16.28, 32.55 and 81.38 steps
    group: dict[str, Any] = {"params": [], "weight_decay": 0.0}
    theirs = OptimizerParamScheduler(
        torch.optim.SGD([{"params": [torch.zeros(1)]}]), 0.0, PEAK, PEAK / 10, warmup, end, style, 0.1, 0.1, 0, "constant",
        wsd_decay_steps=decay, lr_wsd_decay_style=shape,
    )  # fmt: skip
    names = {"WSD": "wsd", "minus_sqrt": "sqrt"}
    of_wsd = {"decay_steps": decay / batch, "decay_shape": names.get(shape, shape)} if style == "WSD" else {}
    ours = rates(kind=names.get(style, style), warmup_steps=warmup / batch, decay_end_step=end / batch, **of_wsd)
    for step, rate in enumerate(ours, 1):
        theirs.num_steps = step * batch
        assert rate == pytest.approx(theirs.get_lr(group), rel=1e-12), step


def test_after_a_decay_that_ends_early_the_rate_stays() -> None:
    for kind in ("wsd", "cosine"):
        curve = rates(kind=kind, warmup_steps=10.5, decay_end_step=60, min_ratio=0.25)
        assert curve[59:] == pytest.approx([PEAK / 4] * 41) and curve[58] > PEAK / 4
        assert curve[:10] == pytest.approx([PEAK * n / 10.5 for n in range(1, 11)])


def test_a_decay_may_end_behind_the_run() -> None:
    assert rates(kind="cosine", decay_end_step=200, min_ratio=0.0)[-1] == pytest.approx(PEAK / 2)


def test_constant_stays_at_the_peak() -> None:
    assert rates(kind="constant") == [PEAK] * STEPS


def test_a_run_of_one_step_has_a_rate() -> None:
    assert learning_rate(1, ScheduleConfig(), peak=PEAK, total_steps=1) == pytest.approx(0.1 * PEAK)
