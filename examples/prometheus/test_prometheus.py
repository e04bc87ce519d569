"""The tracker writes what the run logged."""

from __future__ import annotations

from pathlib import Path

from amfm_prometheus.hook import Prometheus
from amfm_prometheus.spec import SPEC, PrometheusOptions

from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.train import run_steps
from tests.pretrain.tiny_run import read_metrics, tiny_config, tiny_data


def test_a_run_leaves_the_numbers_of_its_newest_step(tmp_path: Path) -> None:
    assert SPEC.load() is Prometheus
    config = tiny_config(tiny_data(tmp_path / "data"), tmp_path / "run", train__steps=2, schedule__warmup_steps=1)
    with SignalWatch() as signals:
        run = start_run(config, signals)
        run.hooks = (*run.hooks, Prometheus(PrometheusOptions(file=str(tmp_path / "run.prom")), run))
        run_steps(run)
        close_run(run)
    found = dict(line.rsplit(" ", 1) for line in (tmp_path / "run.prom").read_text().splitlines())
    newest = read_metrics(run.directory)[-1]
    assert found['amfm_step{run="run"}'] == "2.0"
    assert float(found['amfm_loss{run="run"}']) == newest["loss"]
    assert float(found['amfm_expert_load{run="run",block="1"}']) == newest["expert_load"]["1"]
