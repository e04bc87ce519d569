"""Times in a log of one process are a clock that nothing sets."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

import pytest

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain import start
from amfm.pretrain.launcher_protocol import log_time
from amfm.pretrain.report.data import read_run
from amfm.pretrain.report.goodput import measure_goodput
from amfm.pretrain.train import train
from tests.faults import inject
from tests.pretrain.tiny_run import read_events, read_metrics, tiny_config


def test_a_clock_that_is_set_moves_no_time_of_a_log_and_no_share_of_the_report(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert abs(log_time() - time.time()) < 3600
    true_time, set_by = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: true_time() + set_by[0])
    monkeypatch.setattr(start, "build_hooks", start.build_hooks)  # put back after the test
    for step, seconds in ((1, -86_400.0), (3, 86_400.0)):
        inject.after_step(step, lambda run, seconds=seconds: set_by.__setitem__(0, seconds))
    assert train(tiny_config(data, tmp_path / "run", train__checkpoint_every_steps=2)) == 0
    assert set_by[0] == 86_400.0, "the clock was not set"
    run = tmp_path / "run"
    events = [datetime.fromisoformat(line["time"]).timestamp() for line in read_events(run)]
    lines = [line["time"] for line in read_metrics(run)]
    assert events == sorted(events) and lines == sorted(lines) and events[0] <= lines[0] and lines[-1] <= events[-1] + 1
    use = measure_goodput(read_run(run))
    assert use is not None and use.away == 0 and use.steps + use.measuring < use.held() < 3600
