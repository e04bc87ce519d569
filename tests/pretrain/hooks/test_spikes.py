"""A step far above the recent ones is reported with its samples, once, and changes nothing."""

from __future__ import annotations

from pathlib import Path

from amfm.data_pipeline.config import DataConfig
from tests.pretrain.monitor.test_anomalies import train_with_a_blow
from tests.pretrain.tiny_run import read_events


def test_a_blow_is_reported_with_its_step_and_samples_and_left_out_of_the_window(
    data: DataConfig, tmp_path: Path
) -> None:
    reported = train_with_a_blow(data, str(tmp_path / "on"), {"health__spike_sigma": 5.0})
    (first, *others) = read_events(tmp_path / "on", "spike")
    assert first["step"] in (10, 11) and max(first["sigma"].values()) > 5
    assert first["samples"] == [4 * (first["step"] - 1), 4 * first["step"]]
    assert {event["step"] for event in others} <= {11, 12, 13, 14}
    assert "spike" in reported.metrics[first["step"] - 1] and "spike" not in reported.metrics[7]
    silent = train_with_a_blow(data, str(tmp_path / "off"), {"health__spike_sigma": None})
    assert not read_events(tmp_path / "off", "spike")
    assert silent.series("loss") == reported.series("loss")
