"""Pipeline cuts by planned seconds: what a search prints as a pattern."""

from __future__ import annotations

import pytest

from amfm.launch.plan.cuts import cut_by_seconds
from amfm.launch.plan.estimate import Assumptions
from amfm.launch.plan.layout import Layout
from amfm.model.config.pattern import parse_pattern
from tests.launch.plan.presets import H100, preset


def test_a_cut_by_seconds_is_a_pattern_that_takes_less_time() -> None:
    config = preset("qwen3_next_80b", ranks=128)
    layout = Layout.of(config, 128)
    assert layout.pipeline > 1
    found = cut_by_seconds(config, layout, H100, Assumptions())
    assert found is not None and -0.1 < found.gain < -0.002
    parsed = parse_pattern(found.pattern)
    assert (
        parsed.letters == config.model.letters
        and found.pattern.count("|") == layout.pipeline * layout.virtual_stages - 1
    )
    assert found.estimate.step.total() == pytest.approx((1 + found.gain) * found.before.step.total())
    one_stage = Layout(128, 1, 1, expert=8)
    assert cut_by_seconds(config, one_stage, H100, Assumptions()) is None
