"""An error is judged by its kind and by the phase of the run."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import pytest

from amfm.data_pipeline.store.object_store import NoCredentialsError
from amfm.pretrain.failures import describe, exit_code, imports_in_words, settings_worked, while_running


@pytest.mark.parametrize("name", ["ESTALE", "EIO", "ETIMEDOUT", "ENOTCONN", "ENOSPC", "EDQUOT", "EHOSTDOWN"])
def test_the_machines_state_can_be_resumed_in_every_phase(name: str) -> None:
    assert exit_code(OSError(getattr(errno, name), "x", "path")) == 3


@pytest.mark.parametrize("name", ["ENOENT", "EACCES", "EROFS", "ENOTDIR", "ELOOP"])
def test_a_path_is_the_users_to_correct_until_the_run_is_under_way(name: str) -> None:
    refusal = OSError(getattr(errno, name), "rejected", "runs/x/metrics.jsonl")
    assert exit_code(refusal) == 2
    with pytest.raises(RuntimeError, match=r"runs/x/metrics\.jsonl: rejected; ") as raised, while_running():
        raise refusal
    assert exit_code(raised.value) == 3


def test_what_did_not_answer_in_time_is_the_machine_s_state() -> None:
    """As Ray's GetTimeoutError, which has no number, where the head of a cluster is gone."""
    assert exit_code(TimeoutError("GCS server is dead")) == 3
    assert exit_code(FileNotFoundError("no such dataset")) == 2


def test_credentials_are_the_users_to_set_until_the_run_is_under_way() -> None:
    assert exit_code(NoCredentialsError("none")) == 2
    with pytest.raises(RuntimeError, match="none") as raised, while_running():
        raise NoCredentialsError("none")
    assert exit_code(raised.value) == 3


def test_memory_that_is_used_up_can_be_resumed() -> None:
    with pytest.raises(RuntimeError, match=r"this host's memory is used up \(MemoryError\); give this more") as raised:
        with while_running():
            raise MemoryError
    assert exit_code(raised.value) == 3


@pytest.mark.parametrize("refusal", [RuntimeError("can't start new thread"), BlockingIOError(errno.EAGAIN, "Resource")])
def test_a_thread_or_process_that_the_system_refuses_is_said_with_the_limits_to_raise(refusal: Exception) -> None:
    assert "allows no further process or thread here" in describe(refusal) and "`ulimit -u`" in describe(refusal)


def test_a_plug_in_that_exits_has_not_finished_the_run() -> None:
    with pytest.raises(RuntimeError, match=r"sys\.exit\(0\) was called at .*test_failures\.py:\d+ while") as raised:
        with while_running():
            sys.exit(0)
    assert exit_code(raised.value) == 3


def test_libraries_that_find_no_memory_are_the_machines_state() -> None:
    for text in (
        "libtorch_cpu.so: failed to map segment from shared object",
        "x.so: cannot allocate memory in static TLS",
    ):
        with pytest.raises(MemoryError, match="so"), imports_in_words():
            raise ImportError(text)
    with pytest.raises(ImportError, match="No module"), imports_in_words():
        raise ImportError("No module named 'x'")


def test_a_bug_keeps_its_type() -> None:
    with pytest.raises(KeyError), while_running():
        raise KeyError("step")


def test_words_of_the_system_carry_path_and_remedy() -> None:
    stale = OSError(errno.ESTALE, "Stale file handle", "runs/x")
    assert describe(stale) == "runs/x: Stale file handle; the storage failed; continue when it answers again"


def test_a_kernel_that_does_not_fit_the_card_ends_a_run_in_words() -> None:
    from triton.runtime.errors import OutOfResources

    with (
        pytest.raises(RuntimeError, match=r"a kernel with the tile .* does not fit this GPU") as raised,
        while_running(),
    ):
        raise OutOfResources(300000, 232448, "shared memory")
    assert exit_code(raised.value) == 3


def test_a_path_that_was_good_once_is_the_machine_s_state(tmp_path: Path) -> None:
    """As a mount that became read-only before a restart: the same settings work again when it is back."""
    gone = OSError(errno.EROFS, "Read-only file system", "/data")
    with pytest.raises(OSError, match="Read-only"), settings_worked(str(tmp_path)):
        raise gone
    (tmp_path / "checkpoints/step-00000010").mkdir(parents=True)
    with pytest.raises(RuntimeError, match="/data: Read-only file system"), settings_worked(str(tmp_path)):
        raise gone
