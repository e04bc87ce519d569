"""Storage that fails while a run is under way: it ends with 3, says which path, and continues as if nothing had
been.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from amfm.pretrain.launcher_protocol import RUN_FAILED
from tests.faults.disk import fault, with_faults
from tests.helpers.patience import PATIENCE_SECONDS
from tests.pretrain.tiny_run import read_events, read_metrics, tiny_data

SETTINGS = {"model__pattern": "E-", "train__steps": 4, "train__checkpoint_every_steps": 2}

# Name -> (operation, path below the run directory, error, calls that pass before it).
PASSING = {
    "stale metrics": ("write", "metrics.jsonl", "ESTALE", 2),
    "read-only metrics": ("write", "metrics.jsonl", "EROFS", 2),
    "events time out": ("write", "events.jsonl", "ETIMEDOUT", 1),
    "disconnected metrics": ("fsync", "metrics.jsonl", "ENOTCONN", 0),
    "full log": ("write", "*.jsonl", "ENOSPC", 3),
    "quota of the checkpoint": ("write", "checkpoints/*.safetensors", "EDQUOT", 0),
    "broken checkpoint disk": ("fsync", "checkpoints/*.safetensors", "EIO", 1),
    "checkpoint that gets no name": ("rename", "checkpoints/step-*", "EIO", 1),
    "folder that rejects its fsync": ("fsync", "checkpoints", "EIO", 1),
    "torn manifest": ("write", "checkpoints/*manifest.json*", "torn=5", 1),
}


def run_jobs(place: Path, jobs: dict[str, Any], rules: list[str]) -> dict[str, Any]:
    """The results of storage_child.py for runs under these rules."""
    (place / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run(
        [sys.executable, "-m", "tests.faults.storage_child", str(place)],
        env=with_faults(rules),
        check=True,
        timeout=1500,
    )
    return json.loads((place / "results.json").read_text())


def run_under_faults(place: Path, faults: dict[str, tuple[str, str, str, int]]) -> dict[str, Any]:
    """An undisturbed run, then for each fault one that meets it and is started again without it."""
    rules, runs = [], {"straight": {"run": "straight", "settings": SETTINGS, "ranks": 1}}
    for number, (operation, path, error, after) in enumerate(faults.values()):
        run = f"run{number}"
        rules.append(fault(operation, f"*/{run}/{path}", error, after=after, when=place / f"fault{number}.on"))
        runs[f"fault{number}"] = {"run": run, "settings": SETTINGS, "ranks": 1}
        runs[f"again{number}"] = {"run": run, "settings": SETTINGS, "ranks": 1}
    jobs = {"data": tiny_data(place / "data").model_dump(mode="json"), "runs": runs}
    return run_jobs(place, jobs, rules)


def check_survived(place: Path, results: dict[str, Any], faults: dict[str, tuple[str, str, str, int]]) -> None:
    losses = {line["step"]: line["loss"] for line in read_metrics(place / "straight")}
    assert results["straight"]["codes"] == [0] and len(losses) == SETTINGS["train__steps"]
    for number, name in enumerate(faults):
        run_dir = place / f"run{number}"
        outcome = results[f"fault{number}"]
        assert outcome["codes"] == [RUN_FAILED], (name, outcome)
        assert str(run_dir) in outcome["said"][0], (name, outcome)
        assert results[f"again{number}"] == {"codes": [0], "said": [""]}, (name, results[f"again{number}"])
        assert {line["step"]: line["loss"] for line in read_metrics(run_dir)} == losses, name
        assert all(event["path"] == f"step-{event['step']:08d}" for event in read_events(run_dir, "checkpoint")), name


def test_a_passing_fault_of_the_storage_ends_with_3_and_loses_nothing(tmp_path: Path) -> None:
    faults = {name: PASSING[name] for name in ("broken checkpoint disk",)}
    check_survived(tmp_path, run_under_faults(tmp_path, faults), faults)


@pytest.mark.slow
def test_every_passing_fault_of_the_storage_ends_with_3_and_loses_nothing(tmp_path: Path) -> None:
    check_survived(tmp_path, run_under_faults(tmp_path, PASSING), PASSING)


@pytest.mark.slow
def test_slow_storage_and_folders_that_refuse_fsync_change_nothing(tmp_path: Path) -> None:
    """Writes of 200 kB per second, a save that waits 3 s in an fsync while the next is due, EINVAL for folders."""
    settings = {**SETTINGS, "train__checkpoint_every_steps": 1}
    names = ("straight", "slow", "stuck", "refused")
    rules = [
        fault("write", "*/slow/checkpoints/*.safetensors", "rate=2e5"),
        fault("fsync", "*/stuck/checkpoints/*.safetensors", "sleep=3"),
        fault("fsync", "*/refused/checkpoints", "EINVAL"),
    ]
    runs = {name: {"run": name, "settings": settings, "ranks": 1} for name in names}
    results = run_jobs(tmp_path, {"data": tiny_data(tmp_path / "data").model_dump(mode="json"), "runs": runs}, rules)
    losses = [line["loss"] for line in read_metrics(tmp_path / "straight")]
    for name in names:
        assert results[name] == {"codes": [0], "said": [""]}, (name, results[name])
        assert [line["loss"] for line in read_metrics(tmp_path / name)] == losses
        assert len([event for event in read_events(tmp_path / name) if event["event"] == "checkpoint"]) == 4


@pytest.mark.slow
def test_storage_that_hangs_under_the_loader_is_named_and_the_run_goes_on_after_it(tmp_path: Path) -> None:
    """Reads of the token store hang for good at some step; the watchdog ends the rank, and a new start finds all well."""
    settings = {**SETTINGS, "train__steps": 8, "launch__heartbeat_seconds": 8}
    rules = [fault("read", "*/store/parts/*", "sleep=1000", after=24, when=tmp_path / "hung.on")]
    runs = {
        name: {"run": run, "settings": settings, "ranks": 1}
        for name, run in (("straight", "straight"), ("hung", "run"), ("again", "run"))
    }
    jobs = {"data": tiny_data(tmp_path / "data").model_dump(mode="json"), "runs": runs}
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    child = [sys.executable, "-m", "tests.faults.storage_child", str(tmp_path)]
    done = subprocess.run(
        child, env=with_faults(rules), check=True, timeout=PATIENCE_SECONDS, stderr=subprocess.PIPE, text=True
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert [results[name]["codes"] for name in runs] == [[0], [RUN_FAILED], [0]]
    assert "amfm: rank 0 on " in done.stderr and "no progress for " in done.stderr
    assert ", data; all ranks wait for data, so the storage of data.store is the suspect" in done.stderr
    losses = [[line["loss"] for line in read_metrics(tmp_path / name)] for name in ("straight", "run")]
    assert losses[0] == losses[1] and len(losses[0]) == settings["train__steps"]
