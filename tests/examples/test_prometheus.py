"""What a scrape gets of a run's directory, and what the dashboard asks for."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from amfm_prometheus.scrape import format_metrics, make_server

from amfm.launch.cli import run as amfm
from amfm.pretrain.monitor.follow import FollowedRun
from amfm.pretrain.report.verdict import Verdicts
from tests.launch.test_notify import listening
from tests.pretrain.report.test_report import line, make_run

METRICS = {
    "step": 7, "loss": 2.5, "grad_norm": 0.5, "lr": 1e-3, "tokens": 700, "tokens_per_second": 10.0, "mfu": 0.25,
    "memory_bytes": 5, "step_seconds": 1.0, "seconds": 9.0, "skipped": False, "time": time.time() - 200.0, "expert_load": {"1": 1.25, "3": 1.5},
}  # fmt: skip


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    events = [{"event": "start", "step": 0}, {"event": "checkpoint", "step": 5}, {"event": "start", "step": 5}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/excluded_nodes.json").write_text(
        '{"excluded": {"node1": "lost", "node2": "lost"}, "losses": {}}'
    )
    (tmp_path / "launch/held.jsonl").write_text('{"began_at": 1800000000.5, "before_until": null}\n')
    (tmp_path / "metrics.jsonl").write_text(json.dumps(METRICS) + "\n")
    return tmp_path


def test_a_collector_gets_the_same_numbers_until_the_run_has_ended(
    directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with (directory / "events.jsonl").open("a") as events:
        events.write(json.dumps({"event": "end", "step": 7, "reason": "finished"}) + "\n")
    with listening() as (url, bodies):
        assert amfm(["watch", str(directory), "--otlp", url]) == 0
    (resource,) = bodies[0]["resourceMetrics"]
    names = {each["key"]: each["value"]["stringValue"] for each in resource["resource"]["attributes"]}
    assert names == {"service.name": "amfm", "run": "/".join(directory.parts[-2:]), "dir": str(directory)}
    metrics = {each["name"]: each["gauge"]["dataPoints"][0] for each in resource["scopeMetrics"][0]["metrics"]}
    assert metrics["amfm_loss"]["asDouble"] == 2.5 and metrics["amfm_expert_load"]["asDouble"] == 1.25
    assert metrics["amfm_expert_load"]["attributes"] == [{"key": "block", "value": {"stringValue": "1"}}]
    assert metrics["amfm_state"]["attributes"] == [{"key": "state", "value": {"stringValue": "finished"}}]
    assert metrics["amfm_step"]["timeUnixNano"].isdecimal()
    assert amfm(["watch", str(directory), "--otlp", url]) == 0  # nothing listens there any more
    assert capfd.readouterr().err.count("does not accept metrics") == 1
    assert amfm(["watch", str(directory), "--otlp", "localhost:4318"]) == 2


def test_a_scrape_gets_the_newest_numbers_and_the_state_and_a_foreign_page_nothing(directory: Path) -> None:
    with make_server(Verdicts(FollowedRun(directory)), "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        text = urllib.request.urlopen(f"{address}/metrics").read().decode()
        (directory / "metrics.jsonl").write_text(json.dumps(METRICS) + "\n" + json.dumps(METRICS | {"step": 8}) + "\n")
        later = urllib.request.urlopen(f"{address}/metrics").read().decode()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}/other")
        stranger = urllib.request.Request(f"{address}/metrics", headers={"Host": "rebound.example"})
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(stranger)
        server.shutdown()
    lines = text.splitlines()
    found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    name = f'run="{"/".join(directory.parts[-2:])}",dir="{directory}"'
    assert found[f"amfm_loss{{{name}}}"] == "2.5" and found[f'amfm_expert_load{{{name},block="1"}}'] == "1.25"
    assert text.count("# TYPE amfm_expert_load gauge") == 1 and f'amfm_expert_load{{{name},block="3"}} 1.5' in text
    assert found[f"amfm_step{{{name}}}"] == "7.0" and found[f"amfm_checkpoint_step{{{name}}}"] == "5.0"
    states = {key: value for key, value in found.items() if key.startswith("amfm_state")}
    assert [key for key, value in states.items() if value == "1"] == [f'amfm_state{{{name},state="running"}}']
    assert f"amfm_step{{{name}}} 8.0" in later
    assert found[f"amfm_restarts{{{name}}}"] == "1.0" and found[f"amfm_excluded_nodes{{{name}}}"] == "2.0"
    assert float(found[f"amfm_step_age_seconds{{{name}}}"]) > 100 and f"amfm_launcher_age_seconds{{{name}}}" in found
    names = {key.partition("{")[0] for key in found}
    types = {line.split()[2]: line.split()[3] for line in lines if line.startswith("# TYPE ")}
    assert types.keys() == names and [key for key, kind in types.items() if kind != "gauge"] == ["amfm_restarts"]
    assert "amfm_well" not in text, "without a configuration there is no verdict"
    dashboard = (Path(__file__).parents[2] / "recipes/grafana_dashboard.json").read_text()
    asked = set(re.findall(r"amfm_[a-z_]+", dashboard))
    assert asked - {"amfm_validation_loss", "amfm_last_step"} <= {key.partition("{")[0] for key in found}


def test_a_scrape_gets_the_verdict_of_the_report(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, [line(step, expert_load={}, skipped=False) for step in range(1, 60)])
    (run_dir / "events.jsonl").write_text('{"event": "start", "step": 0}\n')
    assert re.search(r"amfm_well\{.*\} 1\.0", format_metrics(Verdicts(FollowedRun(run_dir))))
    (run_dir / "events.jsonl").write_text('{"event": "start", "step": 0}\n' * 3)
    text = format_metrics(Verdicts(FollowedRun(run_dir)))
    assert re.search(r"amfm_well\{.*\} 0\.0", text) and re.search(r'amfm_finding\{.*rule="failures"\} 1', text)
    alerts = yaml.safe_load((Path(__file__).parents[2] / "recipes/prometheus_alerts.yaml").read_text())
    asked = {
        word
        for group in alerts["groups"]
        for rule in group["rules"]
        for word in re.findall(r"amfm_[a-z_]+", rule["expr"])
    }
    assert asked == {"amfm_well", "amfm_state"}


def test_what_is_no_address_is_refused(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert amfm(["watch", str(directory), "--prometheus", "localhost:web"]) == 2
    assert "must be PORT or HOST:PORT" in capsys.readouterr().err
    assert amfm(["watch", str(directory), "--prometheus", "9464", "--json"]) == 2
