"""Seconds of one exchange: whether links of a node or the network bind it."""

import pytest

from amfm.launch.plan.exchanges.seconds import all_to_all_seconds, ring_seconds
from tests.launch.plan.presets import H100


def test_a_ring_across_nodes_is_bound_by_the_network():
    assert ring_seconds(1e9, 1, H100, calls=1) == 0
    inside, across = ring_seconds(1e12, 8, H100, calls=1), ring_seconds(1e12, 16, H100, calls=1)
    assert inside == pytest.approx(1e12 * 7 / 8 / (0.8 * 450e9), rel=1e-3)
    assert across == pytest.approx(1e12 * 15 / 16 / (0.8 * 400e9), rel=1e-3)


def test_all_to_all_is_bound_by_the_network_once_it_leaves_the_node():
    assert all_to_all_seconds(1e9, 1, H100) == 0
    assert all_to_all_seconds(8e9, 8, H100) == pytest.approx(7e9 / 450e9 / 0.65, rel=1e-3)
    assert all_to_all_seconds(64e9, 64, H100) == pytest.approx(56e9 / 50e9 / 0.65, rel=1e-3)
