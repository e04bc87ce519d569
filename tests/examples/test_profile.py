"""Traces of steps: what a run writes, where the time of its operations is put, on a CPU and on a GPU."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from amfm_profile.trace import HEAD, Share, read_trace

from amfm.launch.cli import run
from amfm.pretrain.train import train
from tests.helpers.json_output import one_object
from tests.pretrain.tiny_run import read_metrics, tiny_config, tiny_data

PROFILE = {"steps": [2, 4], "memory": True}


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, two of them traced, with recomputed attention and experts."""
    folder = tmp_path_factory.mktemp("traced")
    data = tiny_data(folder / "data")
    settings: dict[str, Any] = {"train__recompute": "selective", "train__recompute_blocks": "*E"}
    assert train(tiny_config(data, folder / "run", train__profile=PROFILE, **settings)) == 0
    assert train(tiny_config(data, folder / "plain", **settings)) == 0
    return folder


def test_a_traced_run_gives_the_losses_of_an_untraced_one(traced: Path) -> None:
    plain, run_ = (read_metrics(traced / name) for name in ("plain", "run"))
    assert [line["loss"] for line in run_] == [line["loss"] for line in plain]
    files = sorted(str(path.relative_to(traced / "run/profile")) for path in (traced / "run/profile").rglob("*.gz"))
    assert files == ["step-2/rank-0.json.gz", "step-4/rank-0.json.gz"]
    assert not (traced / "plain/profile").exists()


def test_the_time_of_a_step_is_put_to_blocks_and_kinds_and_nothing_is_lost(traced: Path) -> None:
    trace = read_trace(traced / "run/profile/step-4/rank-0.json.gz")
    assert trace.step == 4 and not trace.on_device
    assert trace.peak_bytes is not None and trace.peak_bytes > 0
    assert sum(trace.shares.values()) == pytest.approx(trace.duration, rel=0.1)
    parts = ["block 0 M", "block 1 E", "block 2 *", "block 3 -"]
    for part in [*parts, HEAD]:
        assert trace.shares[Share("forward", part)] > 0 and trace.shares[Share("backward", part)] > 0, part
    recomputed = {share.part for share in trace.shares if share.kind == "recompute"}
    assert recomputed == {"block 1 E", "block 2 *"}
    assert {"data", "optimizer", "reduce"} <= {share.kind for share in trace.shares}
    placed = sum(time for share, time in trace.shares.items() if share.kind in ("forward", "backward", "recompute"))
    assert placed > 0.3 * trace.duration


def test_the_verb_prints_tables_and_where_to_open_the_trace(traced: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["profile", str(traced / "run")]) == 0
    shown = capsys.readouterr().out
    for words in (
        "Step 4 of rank 0",
        "steps without a trace",
        "Mamba2",
        "recompute",
        "perfetto",
        "step-4/rank-0.json.gz",
    ):
        assert words in shown
    assert run(["profile", str(traced / "run"), "--step", "2", "--json"]) == 0
    found = one_object(capsys.readouterr().out)
    assert found["step"] == 2 and found["kinds"]["forward"] > 0
    assert set(found["blocks"]["Mamba2"]) == {"forward", "backward", "recompute"}
    assert sum(found["kinds"].values()) == pytest.approx(found["milliseconds"], rel=0.1)


def test_what_is_not_there_is_named(traced: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["profile", str(traced / "plain")]) == 2
    assert "has no trace; train it with train.profile='{steps: [20]}'" in capsys.readouterr().err
    assert run(["profile", str(traced / "run"), "--step", "3"]) == 2
    assert "there are step 2 of rank 0, step 4 of rank 0" in capsys.readouterr().err
    for name, content in {
        "cut": b"\x1f\x8b\x08",
        "empty": gzip.compress(b"{}"),
        "other": gzip.compress(b'{"traceEvents": []}'),
    }.items():
        path = tmp_path / f"{name}.json.gz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=name):
            read_trace(path)


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({"steps": [0]}, "train.profile.steps = [0]: the run has the steps 1 to 4; name steps of it"),
        ({"steps": [5]}, "train.profile.steps = [5]"),
        ({"steps": [1], "ranks": [1]}, "train.profile.ranks = [1]: the run has 1 rank(s), counted from 0"),
        ({"steps": []}, "train.profile.steps = []: must have at least 1 item"),
    ],
)
def test_traces_that_no_step_or_rank_would_write_are_refused(
    tmp_path: Path, profile: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tiny_data(tmp_path / "data"), tmp_path / "run").model_dump(mode="json")
    config["train"]["profile"] = profile
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    assert run(["train", str(tmp_path / "run.yaml")]) == 2
    assert message in capsys.readouterr().err


def write_gpu_trace(path: Path) -> None:
    """A step on a GPU as torch.profiler writes it: kernels later than the operations that launched them, two
    threads.
    """

    def event(name: str, category: str, start: float, duration: float, thread: int = 1, **args: Any) -> dict[str, Any]:
        return {
            "ph": "X",
            "name": name,
            "cat": category,
            "ts": start,
            "dur": duration,
            "pid": 1,
            "tid": thread,
            "args": args,
        }

    node = "autograd::engine::evaluate_function: ScanBackward"
    events = [
        event("amfm step 7", "user_annotation", 0, 100),
        event("amfm phase forward", "user_annotation", 1, 60),
        event("amfm block 0 M", "user_annotation", 2, 10),
        event("Scan", "cpu_op", 3, 5, **{"External id": 11, "Sequence number": 4}),
        event("aten::mm", "cpu_op", 20, 5, **{"External id": 12, "Sequence number": 5}),
        event(node, "cpu_op", 30, 10, thread=2, **{"External id": 13, "Sequence number": 4}),
        event("ScanBackward", "cpu_op", 31, 8, thread=2, **{"External id": 14, "Sequence number": 4}),
        event("amfm phase optimizer", "user_annotation", 61, 30),
        event("aten::_fused_adamw_", "cpu_op", 62, 5, **{"External id": 15}),
        event("scan_kernel", "kernel", 10, 20, thread=7, **{"External id": 11}),
        event("gemm", "kernel", 30, 10, thread=7, **{"External id": 12}),
        event("scan_backward_kernel", "kernel", 40, 25, thread=7, **{"External id": 14}),
        event("ncclDevKernel_AllReduce", "kernel", 60, 10, thread=8),
        event("adamw", "kernel", 75, 15, thread=7, **{"External id": 15}),
    ]
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))


def test_kernels_belong_where_the_operation_is_that_launched_them(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.json.gz"
    write_gpu_trace(path)
    trace = read_trace(path)
    assert trace.on_device and trace.busy == 75.0, "60 without a gap from 10 to 70, and 15 of the optimizer"
    assert trace.shares == {
        Share("forward", "block 0 M"): 20.0,
        Share("forward", HEAD): 10.0,
        Share("backward", "block 0 M"): 25.0,
        Share("communication", "-"): 10.0,
        Share("optimizer", "-"): 15.0,
    }
