"""Several ranks on this machine."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from amfm.launch.cluster.child import can_fork
from amfm.launch.cluster.local import join_codes, run_command
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.processes.zygote import call, run_program


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_ranks_get_the_variables_of_torchrun(tmp_path: Path) -> None:
    code = (
        "import os, pathlib; names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE');"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text(' '.join(os.environ[n] for n in names))"
    )
    assert run_command(python(code), 3) == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == ["0 0 3 3", "1 1 3 3", "2 2 3 3"]


@pytest.mark.parametrize(
    ("codes", "joined"), [([0, 0], 0), ([3, 0], 3), ([3, 2], 2), ([0, 1], 1), ([-9, 0], 3), ([3, -9], 3)]
)
def test_the_most_telling_code_wins(codes: list[int], joined: int) -> None:
    assert join_codes(codes) == joined


def test_other_ranks_errors_carry_their_number(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import os, sys; sys.stderr.write('broken\\n'); sys.exit(3 * int(os.environ['RANK']))"
    assert run_command(python(code), 2) == 3
    assert sorted(capfd.readouterr().err.splitlines()) == ["broken", "rank 1: broken"]


def test_a_killed_rank_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "import os, signal, time; os.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGKILL); time.sleep(0.5)"
    )
    assert run_command(python(code), 2) == 3
    assert capfd.readouterr().err == "rank 1: ended by SIGKILL\n"


WAITING = (
    "import os, pathlib, signal, sys, time\n"
    "from amfm.pretrain.monitor.signals import SignalWatch\n"
    "with SignalWatch() as watch:\n"
    "    pathlib.Path(sys.argv[1], 'ready' + os.environ['RANK']).touch()\n"
    "    end = time.monotonic() + 900\n"
    "    while not watch.received and time.monotonic() < end:\n"
    "        time.sleep(0.05)\n"
    "    pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(str(watch.received))\n"
)


FORKED = """
import os, pathlib, signal, sys, time
from concurrent.futures import ThreadPoolExecutor
from amfm.launch.cluster.child import ForkedRank, can_fork
from amfm.launch.cluster.local import run_forked
assert can_fork()
assert ForkedRank(lambda: int("PATH" in os.environ), os.environ, (), is_first=True).wait(), "it lost the variables that it was to keep"
folder, code, kept = pathlib.Path(sys.argv[1]), int(sys.argv[2]), []

def run():
    rank = int(os.environ["RANK"])
    assert os.environ["WORLD_SIZE"] == "3" and os.environ["KIND"] == "forked"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    (folder / str(rank)).write_text(os.environ["AMFM_LAUNCHER_PID"])
    kept.append(ThreadPoolExecutor())  # as torch.compile keeps one
    kept[0].submit(int).result()
    print("said by", rank)
    sys.stderr.write(f"wrong in {rank}\\n")
    if rank == 1 and code < 0:
        os.kill(os.getpid(), -code)
    if rank == 1 and code == 1:
        raise KeyError("bug")
    return code if rank == 1 else 0

sys.exit(run_forked(run, 3, {"KIND": "forked"}))
"""


@pytest.mark.parametrize(
    ("code", "joined"), [(0, 0), *(pytest.param(code, code, marks=pytest.mark.slow) for code in (1, 2)), (-9, 3)]
)
def test_forked_ranks_are_told_apart_and_end_as_processes_of_their_own_do(
    code: int, joined: int, tmp_path: Path
) -> None:
    launcher = run_program([*python(FORKED), str(tmp_path), str(code)])
    assert launcher.returncode == joined, launcher.stderr
    assert launcher.stdout == "said by 0\n"
    assert {"wrong in 0", "rank 1: wrong in 1", "rank 2: wrong in 2"} <= set(launcher.stderr.splitlines())
    assert ("rank 1: ended by SIGKILL" in launcher.stderr) == (code == -9)
    assert ("rank 1: KeyError: 'bug'" in launcher.stderr) == (code == 1)
    assert len({(tmp_path / str(rank)).read_text() for rank in range(3)}) == 1


def compute_with_two_threads() -> None:
    assert can_fork()
    torch.set_num_threads(2)
    torch.ones(1 << 20).mul(2).sum()
    assert not can_fork(), "OpenMP's threads would be missing in a fork, which waits for them for ever"


def test_a_process_that_has_computed_with_two_threads_is_not_forked() -> None:
    assert call(compute_with_two_threads).wait() == 0


def launch(command: list[str]) -> None:
    sys.exit(run_command(command, 2))


def test_signals_reach_every_rank(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WAITING, str(tmp_path)]
    launcher = call(launch, command)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(list(tmp_path.glob("ready*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    os.kill(launcher.pid, signal.SIGUSR1)
    assert launcher.wait() == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == [str(int(signal.SIGUSR1))] * 2
