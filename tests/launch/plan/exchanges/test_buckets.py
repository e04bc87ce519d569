"""Buckets of gradients, and what of them is on a rank."""

from dataclasses import replace

import pytest

from amfm.launch.plan.exchange import BUCKET_ELEMENTS
from amfm.launch.plan.exchanges.buckets import bucket_sizes, bucketed_bytes, resting_bytes
from amfm.launch.plan.layout import Layout, held_by_stages
from tests.launch.plan.presets import preset


def test_a_share_and_two_buckets_of_gradients_lie_there_under_zero_2():
    config = preset("ladder_1b_a300m")
    layout = Layout(8, 2, 1)
    (held,) = held_by_stages(config.model, layout, config.train.sequence_length)
    (sizes,) = bucket_sizes(held, layout)
    assert sum(sizes) == pytest.approx(held.parameters) and min(sizes[:-1]) >= 50_000_000
    assert resting_bytes(held, layout) == pytest.approx(4 * (held.parameters / 8 + sizes[0]))
    assert resting_bytes(held, layout) < bucketed_bytes(held, layout) < 4 * held.parameters
    assert resting_bytes(held, replace(layout, zero_stage=1)) == 4 * held.parameters
    small = preset("ladder_20m")
    (alone,) = held_by_stages(small.model, layout, small.train.sequence_length)
    # Of one bucket, too, the share of the passes before is next to the sum.
    assert bucketed_bytes(alone, layout) == resting_bytes(alone, layout) == pytest.approx(4.5 * alone.parameters)
    dense, spread = bucket_sizes(held, replace(layout, expert=4))
    assert sum(dense) + sum(spread) == pytest.approx(held.parameters)
    exact = replace(held, parts=((BUCKET_ELEMENTS - 4.0, 0.0), (4.0, 0.0), (3.0, 0.0)))
    assert bucket_sizes(exact, layout) == [[BUCKET_ELEMENTS, 3.0]], "a bucket that is full is closed"
