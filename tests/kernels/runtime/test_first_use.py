"""The first use of a kernel on a GPU, with Triton's interpreter as the GPU: checked once, and rejected with an error if
wrong.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from amfm.kernels.runtime import backend, first_use
from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.runtime.first_use import CannotCheck, digest_source, read_or_check
from tests.kernels.acceptance.forked_child import run_forked

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the check starts its own interpreter")

PLANTED = "tests.kernels.acceptance.planted"


@pytest.fixture
def forked_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check in forks; the slow tests here start the interpreters that a run starts."""
    forks = SimpleNamespace(run=run_forked, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(first_use, "subprocess", forks)


def test_what_is_kept_is_read_and_another_card_asks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = count_checks(monkeypatch)
    assert read_or_check("wrong", "cpu", "NVIDIA H100, torch 2.11", [tmp_path], PLANTED) == []
    (kept,) = tmp_path.glob("*.json")
    assert "NVIDIA-H100" in kept.name and digest_source(PLANTED) in kept.name
    kept.write_text(json.dumps({"faults": ["as kept"]}))
    assert read_or_check("wrong", "cpu", "NVIDIA H100, torch 2.11", [tmp_path], PLANTED) == ["as kept"]
    assert read_or_check("wrong", "cpu", "NVIDIA B200, torch 2.11", [tmp_path], PLANTED) == []
    assert checks == ["wrong", "wrong"]


@pytest.mark.slow
def test_a_wrong_kernel_is_found_once_and_remembered_for_this_card_and_source(
    tmp_path: Path, forked_checks: None
) -> None:
    """Quick: the test above, and wrong kernels that are found in tests/kernels/acceptance/test_main.py and below."""
    faults = read_or_check("wrong", "cpu", "NVIDIA H100, torch 2.11", [tmp_path], PLANTED)
    assert len(faults) == 1 and faults[0].startswith("the wrong one: d_x is off by")
    (kept,) = tmp_path.glob("*.json")
    assert "NVIDIA-H100" in kept.name and digest_source(PLANTED) in kept.name
    # What is kept is read, not found again; another GPU asks again.
    kept.write_text(json.dumps({"faults": ["as kept"]}))
    assert read_or_check("wrong", "cpu", "NVIDIA H100, torch 2.11", [tmp_path], PLANTED) == ["as kept"]


@pytest.mark.slow
def test_a_kernel_that_crashes_is_found_and_a_right_one_is_not(tmp_path: Path) -> None:
    (fault,) = read_or_check("crash", "cpu", "a GPU", [tmp_path], PLANTED)
    assert fault.startswith("the crash one: the check ended with code -11")
    assert read_or_check("right", "cpu", "a GPU", [None], PLANTED) == []


@pytest.mark.slow
def test_a_check_that_cannot_run_is_an_error_and_not_a_verdict(tmp_path: Path) -> None:
    with pytest.raises(CannotCheck, match=r"kernels of right could not be checked on this GPU.*no_such_module"):
        read_or_check("right", "cpu", "a GPU", [tmp_path], "tests.no_such_module")
    assert not [*tmp_path.glob("*.json")]


def test_a_folder_that_cannot_be_written_costs_a_check_and_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `docker --user` has it with HOME=/, a read-only home, a full quota: here a folder whose parent is a file."""
    checks = count_checks(monkeypatch)
    (tmp_path / "home").write_text("not a folder")
    homeless = [tmp_path / "home" / ".cache", None]
    assert read_or_check("right", "cpu", "a GPU", homeless, PLANTED) == read_or_check(
        "wrong", "cpu", "a GPU", homeless, PLANTED
    )
    assert checks == ["right", "wrong"]
    assert [record.getMessage() for record in caplog.records if "not kept" in record.getMessage()] == [
        f"checks of kernels are not kept ({homeless[0]} cannot be written), so each start repeats them; set XDG_CACHE_HOME"
    ]
    # The next folder keeps them, and is not even asked for where the first one knows.
    read_or_check("right", "cpu", "a GPU", [*homeless, tmp_path / "scratch"], PLANTED)
    read_or_check("right", "cpu", "a GPU", [*homeless, tmp_path / "scratch"], PLANTED)
    assert checks == ["right", "wrong", "right"]


def test_a_home_without_locks_and_a_quota_that_is_full_do_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = count_checks(monkeypatch)

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")  # Lustre without -o flock

    monkeypatch.setattr(first_use.fcntl, "flock", flock)
    assert read_or_check("right", "cpu", "a GPU", [tmp_path / "lustre"], PLANTED) == []
    assert read_or_check("right", "cpu", "a GPU", [tmp_path / "lustre"], PLANTED) == []
    assert checks == ["right"]

    def write(*_: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(first_use, "write_whole", write)
    assert read_or_check("right", "cpu", "a GPU", [tmp_path / "full"], PLANTED) == []
    assert not [*(tmp_path / "full").glob("*.json")]


def count_checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations that are checked from now on, each right at once, while no one has been warned."""
    checks: list[str] = []

    def check(operation: str, *_: object) -> list[str]:
        checks.append(operation)
        return []

    monkeypatch.setattr(first_use, "check_now", check)
    first_use._warn_not_kept.cache_clear()
    return checks


@pytest.mark.parametrize(
    ("operation", "faults"), [("off", ["off: y is off by"]), pytest.param("plain", [], marks=pytest.mark.slow)]
)
def test_a_gpu_for_one_process_is_checked_in_this_one_and_draws_nothing_from_its_generators(
    monkeypatch: pytest.MonkeyPatch, forked_checks: None, operation: str, faults: list[str]
) -> None:
    """The cases reject every process but this one in CUDA's words, as a GPU in exclusive-process mode does."""
    monkeypatch.setenv("AMFM_TEST_OWNER", str(os.getpid()))
    before = torch.get_rng_state()
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(refuse_to_keep, refuse_to_keep):
        found = read_or_check(operation, "cpu", "a GPU", [None], "tests.kernels.acceptance.exclusive")
    assert [fault[: len("off: y is off by")] for fault in found] == faults
    assert torch.equal(torch.get_rng_state(), before)
    assert first_use.CHECKING_VARIABLE not in os.environ


def test_a_check_that_cannot_run_is_a_warning_with_its_cause_and_no_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def find(*_: object) -> list[str]:
        raise CannotCheck("the kernels of norm could not be checked on this GPU: OSError: no more processes")

    monkeypatch.setattr(backend, "find_faults", find)
    backend._refuse_operation.cache_clear()
    assert backend._refuse_operation("norm", torch.device("cuda", 0)) is None
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "no more processes; they run unchecked" in said


def refuse_to_keep(tensor: torch.Tensor) -> torch.Tensor:
    raise AssertionError("a recomputed block would count what the check saves")
