"""The cost of a check is what a checked step and the one after it take over two plain ones."""

from __future__ import annotations

import pytest

from benchmarks.command import run
from benchmarks.state_check import state_check
from tests.helpers.json_output import one_object


@pytest.mark.slow
def test_a_check_costs_steps_and_says_how_often_it_may_come(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(state_check, ["--rounds", "1", "--json"]) == 0
    found = one_object(capfd.readouterr().out)
    assert found["plain_step_seconds"] > 0
    assert found["every_steps_for_half_a_percent"] == pytest.approx(found["check_steps"] / 0.005)
