"""A resumed run is one run of MLflow, with its settings and every step; a server that is away ends nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.train import run_steps
from tests.pretrain.tiny_run import read_metrics, tiny_config, tiny_data

# Not by its name, which is that of this folder too.
pytest.importorskip("mlflow.entities", reason="NOT TESTED: MLflow is in no extra")
from amfm_mlflow.hook import Mlflow
from amfm_mlflow.spec import SPEC, MlflowOptions
from mlflow import MlflowClient


def train(config: RunConfig, uri: str) -> None:
    with SignalWatch() as signals:
        run = start_run(config, signals)
        hook = Mlflow(MlflowOptions(experiment="tiny", tracking_uri=uri), run)
        hook.at_start()
        run.hooks = (*run.hooks, hook)
        run_steps(run)
        hook.at_end()
        close_run(run)


def test_a_resumed_run_is_one_run_of_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # for tests; a server has a database
    assert SPEC.load() is Mlflow
    data, uri = tiny_data(tmp_path / "data"), (tmp_path / "mlruns").as_uri()
    config = tiny_config(data, tmp_path / "run", train__steps=4, schedule__warmup_steps=1)
    train(config.model_copy(update={"train": config.train.model_copy(update={"stop_after_steps": 2})}), uri)
    train(config, uri)
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    losses = {point.step: point.value for point in client.get_metric_history(run.info.run_id, "loss/train")}
    assert losses == pytest.approx({line["step"]: line["loss"] for line in read_metrics(tmp_path / "run")})
    assert run.data.params["train.steps"] == "4" and run.info.status == "FINISHED"


def test_a_server_that_is_away_is_said_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = tiny_config(tiny_data(tmp_path / "data"), tmp_path / "run", train__steps=2, schedule__warmup_steps=1)
    train(config, "http://127.0.0.1:9")
    assert len(read_metrics(tmp_path / "run")) == 2
    assert capfd.readouterr().err.count("MLflow does not take this run's metrics") == 1
