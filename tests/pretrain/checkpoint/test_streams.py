"""A run with another residual stream continues where it stopped, and from a plain model's weights at that model's loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.inference.weights import read_weights, write_weights
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.start import close_run, start_run
from tests.pretrain.tiny_run import assert_resumes_bitwise, tiny_config, train_and_collect, validate_now

STREAMS = {
    "final_stream.query": {"model__attention_residuals": {"blocks_per_source": 2}},
    "blocks.1.stream.maps.weight": {"model__hyper_connections": {"streams": 3}},
}


@pytest.mark.slow
@pytest.mark.parametrize("learns", STREAMS)
def test_a_resumed_run_is_the_uninterrupted_one_bitwise(data: DataConfig, tmp_path: Path, learns: str) -> None:
    whole = assert_resumes_bitwise(data, tmp_path, **STREAMS[learns], train__recompute="full")
    assert float(whole.weights[learns].abs().max()) > 0


@pytest.mark.slow
def test_a_plain_model_goes_on_with_another_stream_at_its_loss(data: DataConfig, tmp_path: Path) -> None:
    train_and_collect(tiny_config(data, tmp_path / "plain"))
    (tmp_path / "weights").mkdir()
    write_weights(tmp_path / "weights", read_weights(tmp_path / "plain"))
    losses = []
    for name, settings in ({"plain again": {}} | STREAMS).items():
        settings = settings | {"run__initial_weights": str(tmp_path / "weights")}
        with SignalWatch() as signals:
            run = start_run(tiny_config(data, tmp_path / name, **settings), signals)
            losses.append(validate_now(run).loss)
            close_run(run)
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-6)  # float32 sums in another order
