"""The acceptance command on a CPU: verdicts, crashes, limits and its report, with planted faults that it must find."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest

from amfm.kernels.acceptance import __main__ as command
from amfm.kernels.acceptance.__main__ import Report, main
from amfm.kernels.acceptance.process import Finished, run_child
from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.runtime.first_use import child_command
from tests.helpers.patience import PATIENCE_SECONDS
from tests.kernels.acceptance.forked_child import run_forked

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the command starts interpreters of its own")

PLANTED = ["--cases", "tests.kernels.acceptance.planted", "--device", "cpu"]


# Exit code, what was written to standard error, and the report.
Planted = tuple[int, str, dict]


def accept(folder: Path, *operations: str, stages: str = "compile,check") -> Planted:
    """One run over planted operations."""
    out = folder / "report.json"
    asked = [word for operation in operations for word in ("--op", operation)]
    with redirect_stderr(io.StringIO()) as said:
        code = main([*PLANTED, "--out", str(out), "--jobs", "1", "--stages", stages, *asked])
    return code, said.getvalue(), json.loads(out.read_text())


def run_forked_child(settings: dict[str, Any], _seconds: float, *, interpreted: bool, **_: object) -> Finished:
    """As `run_child`, in a fork. A child with its own interpreter: `crashed`, and runtime/test_first_use.py in `make test`."""
    assert interpreted
    child = run_forked(child_command(settings), cwd=Path.cwd())
    assert child.returncode == 0, child.stderr
    return Finished([json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")], "")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """One check of the operation with a wrong gradient behind a right trial."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "run_child", run_forked_child)
        return accept(tmp_path_factory.mktemp("acceptance"), "wrong", stages="check")


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """One run over that and one that crashes behind a right trial."""
    return accept(tmp_path_factory.mktemp("acceptance"), "wrong", "crash")


@pytest.mark.slow
def test_any_fault_ends_with_three_and_is_named(crashed: Planted) -> None:
    code, said, _ = crashed
    assert code == 3, said
    assert "check wrong: the wrong one: d_x is off by" in said
    assert "check crash: the crash one: ended with signal SIGSEGV" in said
    assert "compile _broken_kernel: BLOCK=64" in said and "does not compile with {" in said and "num_warps" in said


@pytest.mark.slow
def test_spills_of_a_kernel_that_compiles_are_counted(crashed: Planted) -> None:
    _, _, report = crashed
    assert [row["spill_bytes"] for name, row in report["compile"].items() if name.startswith("_triple_kernel:")] == [0]


def test_a_right_trial_has_no_fault_and_numbers_of_every_tensor(planted: Planted) -> None:
    code, _, report = planted
    assert code == 3 and report["machine"]["versions"]["triton"]
    right = report["check"]["wrong"]["trials"][0]
    assert right["faults"] == []
    assert {tensor["name"] for tensor in right["tensors"]} == {"y", "d_x"}
    assert right["compiled"]


@pytest.mark.slow
def test_what_was_found_before_a_crash_stands(crashed: Planted) -> None:
    _, _, report = crashed
    (trial,) = report["check"]["crash"]["trials"]
    assert (trial["trial"], trial["faults"]) == ("a right one", [])


def test_a_child_that_crashes_is_a_fault_of_its_trial_and_what_it_wrote_before_is_kept() -> None:
    lines = [{"trial": "a right one"}, {"begun": "the crash one"}]
    crash = "; ".join([*(f"echo '{json.dumps(line)}'" for line in lines), "kill -SEGV $$"])
    finished = run_child({"do": "run", "device": "cpu"}, PATIENCE_SECONDS, before=["sh", "-c", crash])
    assert (finished.lines, finished.fault) == (lines, "the crash one: ended with signal SIGSEGV")


def test_one_wrong_gradient_among_right_tensors_decides(planted: Planted) -> None:
    _, _, report = planted
    wrong = report["check"]["wrong"]["trials"][1]
    by_name = {tensor["name"]: tensor for tensor in wrong["tensors"]}
    assert by_name["y"]["error"] <= by_name["y"]["bound"]
    assert by_name["d_x"]["error"] > by_name["d_x"]["bound"]


def test_a_child_is_stopped_at_its_limit() -> None:
    finished = run_child({"do": "describe", "device": "cpu"}, 0.5)
    assert finished.lines == [] and finished.fault == "was stopped after 0.5 s"


def test_a_sanitizer_that_finds_something_is_a_fault() -> None:
    found = ["sh", "-c", "echo racecheck: 2 hazards >&2; exit 86"]
    finished = run_child({"do": "run", "device": "cpu"}, 20, before=found)
    assert finished.fault == "ended with exit code 86: racecheck: 2 hazards"


@pytest.mark.slow
def test_an_operation_that_never_ends_is_stopped_and_others_go_on(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    out = tmp_path / "report.json"
    words = [*PLANTED, "--out", str(out), "--stages", "check", "--op", "hang", "--op", "right", "--seconds", "120"]
    assert main(words) == 3
    assert "check hang: the hang one: was stopped after 120 s" in capfd.readouterr().err
    assert json.loads(out.read_text())["check"]["right"]["faults"] == []


def test_a_report_of_another_machine_is_not_gone_on_with(tmp_path: Path) -> None:
    here, out = {"card": "NVIDIA H200"}, tmp_path / "report.json"
    Report(out, here).put("check", "moe", {"trials": [], "faults": ["off"]})
    assert Report(out, here).faults() == ["check moe: off"]
    with pytest.raises(ValueError, match=r"is the report of another machine.*H200.*name another --out"):
        Report(out, {"card": "NVIDIA H100"})


def test_arguments_that_mean_nothing_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert main([*PLANTED, "--out", str(tmp_path / "report.json"), "--op", "nonsense"]) == 2
    assert "--op nonsense: there is no such operation; use right, wrong" in capfd.readouterr().err
    for cases, why in (("no_such_module", "No module named 'no_such_module'"), ("math", "no attribute 'OPERATIONS'")):
        assert main([*PLANTED, "--out", str(tmp_path / "report.json"), "--cases", cases]) == 2
        assert re.search(f"error: --cases {cases}: .*{why}; name a module", capfd.readouterr().err)
    for words, said in ((["--stages", "weigh"], "no such stage"), (["--kinds", "odd"], "no such kind of trial")):
        with pytest.raises(SystemExit, match="2"):
            main([*PLANTED, *words])
        assert said in capfd.readouterr().err


def test_a_machine_without_a_gpu_is_told_what_works(capfd: pytest.CaptureFixture) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert main([]) == 2
    said = capfd.readouterr().err
    assert "found torch" in said and "pip install" in said and "compute capability 8.0" in said
