"""The whole job on a GPU, rehearsed on a CPU: verdicts, stages that fail, and one that goes through."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.command import run
from benchmarks.gpu_job.__main__ import describe_reserved, gpu_job, print_job
from benchmarks.gpu_job.job import LIMITS, STAGES, Job, judge_losses, run_stages

CPU = [4.0, 3.5, 3.0]


def test_losses_are_judged_by_the_first_step_and_by_the_worst() -> None:
    limits = LIMITS["float32"]
    assert judge_losses([4.0001, 3.51, 2.99], CPU, limits) == []
    assert judge_losses([4.01, 3.5, 3.0], CPU, limits) == ["the first loss differs by 0.0025, above 0.0001"]
    assert judge_losses([4.0, 3.8, 3.0], CPU, limits) == ["the loss of step 2 differs by 0.086, above 0.02"]
    assert judge_losses([4.0, float("nan"), 3.0], CPU, limits) != []
    assert judge_losses([4.0], CPU, limits) == ["1 steps instead of 3"]


def test_a_stage_that_fails_stops_no_other_and_stands_in_the_report(tmp_path: Path) -> None:
    said: list[str] = []
    job = Job("cpu", tmp_path, 2, {"missing": (str(tmp_path / "missing.yaml"), ())})
    found = run_stages(job, ["resume", "memory"], tmp_path / "report.json", report=said.append)
    assert [fault.partition(":")[0] for fault in found["faults"]] == ["resume", "memory"]
    assert all("missing.yaml" in fault for fault in found["faults"])
    assert json.loads((tmp_path / "report.json").read_text()) == found
    assert any(line.startswith("FAULT in resume: exit code 2") for line in said)


def test_what_an_allocator_reserved_is_in_gib_and_retries_are_named() -> None:
    assert describe_reserved(None) == ""
    assert describe_reserved({"reserved_bytes": 3 << 30, "alloc_retries": 0, "ooms": 0}) == "3.000"
    assert describe_reserved({"reserved_bytes": 3 << 29, "alloc_retries": 2, "ooms": 0}) == "1.500, 2 retries"


def test_what_cannot_begin_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old").write_text("")
    for words, said in (
        (["--stage", "nonsense"], "--stage nonsense: there is no such stage; use losses, resume, two_gpus"),
        (["--device", "cpu", "--folder", str(tmp_path)], "is not empty"),
        (["--device", "tpu"], "--device tpu: use cuda, or cpu"),
    ):
        assert run(gpu_job, words) == 2
        assert said in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert run(gpu_job, []) == 2
        assert "this machine has no GPU that answers; rehearse with --device cpu" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="this machine has two")
def test_two_gpus_are_not_compared_where_there_are_fewer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_stages(Job("cuda", tmp_path, 2), ["two_gpus"], tmp_path / "report.json", report=print)
    number = torch.cuda.device_count()
    assert found["stages"]["two_gpus"] == {"skipped": f"this machine shows {number} GPU", "faults": []}
    print_job(found)
    assert f"two_gpus: not run, this machine shows {number} GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_the_job_goes_through_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both sides are the CPU, so float32 gives equal losses, and a resume equal bits."""
    experts = "model.moe={num_experts: 4, top_k: 2, expert_hidden_size: 32, auxiliary_loss_weight: 0.01}"
    settings = ("train.num_threads=1", "model.pattern=ME*", experts)
    job = Job("cpu", tmp_path, 4, {"mqar": ("configs/probes/mqar.yaml", settings)})
    found = run_stages(job, [*STAGES], tmp_path / "report.json", report=print)
    assert found["faults"] == []
    losses = found["stages"]["losses"]["losses"]["mqar"]
    assert losses["cpu float32"] == losses["compared with: cpu float32"] and len(losses["cpu bf16"]) == 4
    assert found["stages"]["resume"]["steps"] == 4
    two = found["stages"]["two_gpus"]
    assert {len(losses) for losses in two["losses"].values()} == {4} and two["differing_steps"] == []
    assert two["losses"]["one"] != two["losses"]["one in slots"], "choices beyond a slot are lost"
    starts = found["stages"]["first_start"]["first_start"]["mqar"]
    assert starts["filled_seconds"] > 0 and starts["empty_seconds"] > 0
    assert found["stages"]["profile"]["kernels"][0]["milliseconds"] > 0
    print_job(found)
    said = capsys.readouterr()
    assert "Longest operations" in " ".join(said.out.split())
    assert "two_gpus: resumed, 0 steps with other bits" in said.err
