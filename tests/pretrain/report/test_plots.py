"""The axes and looks of curves."""

import itertools

import numpy as np

from amfm.pretrain.report.curves import curve_style, noisy_curve, usual_range
from amfm.pretrain.report.overlay import MAX_RUNS


def long_loss(num_steps: int) -> tuple[range, np.ndarray]:
    steps = range(1, num_steps + 1)
    noise = np.random.default_rng(0).normal(0, 0.04, num_steps)
    return steps, 2.45 + 8 * np.array(steps) ** -0.35 + noise


def test_the_last_half_of_a_long_run_has_more_than_40_of_100_of_the_height() -> None:
    steps, losses = long_loss(60_000)
    losses[777] = 20.0
    low, high = usual_range([noisy_curve(steps, losses.tolist(), series=0)])
    last = losses[30_000:]
    assert (min(high, last.max()) - max(low, last.min())) / (high - low) > 0.4
    assert high < 3.1 and low < np.quantile(last, 0.01), "what a reader looks at is inside"


def test_a_short_run_and_one_without_outliers_have_their_whole_range() -> None:
    steps, losses = long_loss(100)
    assert usual_range([noisy_curve(steps, losses.tolist(), series=0)]) is None
    assert usual_range([noisy_curve(range(1000), np.linspace(2, 1, 1000).tolist(), series=0)]) is None
    assert usual_range([noisy_curve(range(1000), [1.0] * 1000, series=0)]) is None


def test_a_loss_that_rises_at_the_end_stays_on_its_axis() -> None:
    steps, losses = long_loss(10_000)
    losses[-100:] += np.linspace(0, 3, 100)
    _, high = usual_range([noisy_curve(steps, losses.tolist(), series=0)])
    assert high > 5


def test_each_run_of_a_page_has_its_own_look_and_neighbours_differ_in_colour_and_dashes() -> None:
    looks = [curve_style(number) for number in range(MAX_RUNS)]
    assert len(set(looks)) == MAX_RUNS
    assert all(a[0] != b[0] and a[1] != b[1] for a, b in itertools.pairwise(looks))
