"""Series of any length become short, and keep what a reader looks for."""

import numpy as np

from amfm.pretrain.report.numbers import keep_extremes, make_columns, mean_of_spans, smooth


def test_a_spike_and_a_dip_of_one_step_survive_any_thinning():
    steps = list(range(1, 10_001))
    values = [1.0] * 10_000
    values[4_321], values[7_777] = 50.0, -3.0
    thin_steps, thin_values = keep_extremes(steps, values, 100)
    assert len(thin_values) <= 100
    assert dict(zip(thin_steps, thin_values))[4_322] == 50.0
    assert dict(zip(thin_steps, thin_values))[7_778] == -3.0
    assert (thin_steps[0], thin_steps[-1]) == (1, 10_000)
    assert thin_steps == sorted(thin_steps)


def test_a_short_series_stays_as_it_is():
    assert keep_extremes([3, 5], [1.0, 2.0], 4) == ([3, 5], [1.0, 2.0])
    assert keep_extremes([], [], 4) == ([], [])


def test_spans_have_the_mean_of_their_values_or_nothing():
    assert mean_of_spans([1, 2, 5], [1.0, 3.0, 7.0], [0.5, 2.5, 4.5, 5.5]) == [2.0, None, 7.0]


def test_smoothing_starts_at_the_first_value_and_follows():
    smoothed = smooth([4.0] + [2.0] * 50)
    assert smoothed[0] == 4.0
    assert abs(smoothed[-1] - 2.0) < 1e-6
    assert smooth([]) == [] and smooth([3.0]) == [3.0]


def test_smoothing_comes_neither_late_nor_early():
    """A straight line stays one, and a step is half done where it is."""
    assert np.allclose(smooth(np.arange(3000.0).tolist()), np.arange(3000.0))
    smoothed = smooth([2.0] * 1500 + [1.0] * 1500)
    assert abs(smoothed[1499] + smoothed[1500] - 3.0) < 1e-9
    assert smoothed[1480] == 2.0 and smoothed[1520] == 1.0


def test_columns_keep_ends_and_means_and_a_spike_its_step():
    values = [1.0] * 10_000
    values[4_321], values[7_777] = 50.0, -3.0
    columns = make_columns(range(1, 10_001), values, 100)
    assert len(columns.steps) == 100 and (columns.steps[0], columns.steps[-1]) == (1, 10_000)
    assert columns.steps[columns.highs.index(50.0)] == 4_322 and columns.steps[columns.lows.index(-3.0)] == 7_778
    assert np.isclose(np.mean(columns.means), np.mean(values))
    assert make_columns([3, 5], [1.0, 2.0], 4).means == (1.0, 2.0) and make_columns([], [], 4).steps == ()
