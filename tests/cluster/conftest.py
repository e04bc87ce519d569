"""A run for clusters, the losses that it must end with, a folder with a short path for sockets, and the table of faults."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.config.schema import RunConfig
from tests.cluster.cluster import amfm, metrics
from tests.cluster.watch import Row, Watch, table, to_dict
from tests.pretrain.tiny_run import tiny_config, tiny_data

STEPS = 60
TABLE = Path("build/cluster.md")
WatchRun = Callable[..., AbstractContextManager[Row]]


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="c.", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)
    for printed in path.parent.glob(f"{path.name}.*.out"):
        printed.unlink()


def write_run(folder: Path, run_dir: Path, **overrides: Any) -> RunConfig:
    """A run of `STEPS` steps that any of one, two, three and six ranks can share, written to run.yaml next to it."""
    config = tiny_config(
        tiny_data(folder / "data"),
        run_dir,
        **{
            "train__steps": STEPS,
            "train__global_batch_size": 12,
            "train__sequence_length": 256,
            "train__checkpoint_every_steps": 10,
            # Not more: at 3e-3 just the order of a sum over ranks moves the last losses by 2e-3, as nothing does at this one.
            "optimizer__learning_rate": 1e-3,
            "launch__heartbeat_seconds": 60.0,
            "launch__node_wait_seconds": 10.0,
            "launch__slurm": {"gpus": False, "signal_seconds": 60},
            **overrides,
        },
    )
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    (run_dir.parent / "run.yaml").write_text(resolved_yaml(config))
    return config


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> list[float]:
    """Losses of the run on one rank that nothing disturbs; run once, whichever of several workers comes first."""
    base = tmp_path_factory.getbasetemp()
    root = (base if worker_id == "master" else base.parent) / "undisturbed"
    root.mkdir(exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "done").exists():
            write_run(root, root / "run")
            subprocess.run(amfm("train", root / "run.yaml"), check=True, capture_output=True)
            (root / "done").touch()
    return [line["loss"] for line in metrics(root / "run")]


def check_losses(run_dir: Path, expected: list[float]) -> None:
    """Every step is there once, with the loss of an undisturbed run: sums over ranks differ only in their order."""
    losses = [line["loss"] for line in metrics(run_dir)]
    assert len(losses) == len(expected)
    assert losses == pytest.approx(expected, rel=1e-5)  # of float32, as tests/parallel/test_layouts.py has it


@pytest.fixture
def watch(folder: Path, undisturbed: list[float], record_property: Callable[[str, object], None]) -> WatchRun:
    """Watch the run of this test from the moment of its fault to its end: `with watch(engine, fault): ...`"""

    @contextmanager
    def begin(engine: str, fault: str, run_name: str = "run", expected: Sequence[float] = undisturbed) -> Iterator[Row]:
        row, logs, run_dir = Row(engine, fault), sorted(folder.glob("run/logs/slurm-*.log")), folder / run_name
        with Watch(row, run_dir, logs[-1] if logs else folder / "launch.log"):
            yield row
        losses = [line["loss"] for line in metrics(run_dir)]
        if len(losses) == len(expected):
            row.difference = max(abs(ours - theirs) for ours, theirs in zip(losses, expected, strict=True))
        record_property("row", to_dict(row))

    return begin


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the rows of the tests that passed, and write them for the docs, behind those that are there."""
    reports = terminalreporter.stats.get("passed", [])
    rows = [value for report in reports for name, value in getattr(report, "user_properties", ()) if name == "row"]
    if rows and not hasattr(terminalreporter.config, "workerinput"):  # a worker of xdist, whose rows the master has too
        TABLE.parent.mkdir(exist_ok=True)
        head, *lines = table(rows).splitlines(keepends=True)
        TABLE.write_text((TABLE.read_text() if TABLE.exists() else head + lines[0]) + "".join(lines[1:]))
        terminalreporter.section(f"faults ({TABLE})")
        terminalreporter.write(TABLE.read_text())
