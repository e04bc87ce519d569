"""A rank in which no Python can run any more is ended from outside, with its stacks; one that is stopped gets its time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from amfm.pretrain.monitor import guard
from amfm.pretrain.monitor.guard import LOOK_SECONDS, Signs, is_stopped
from tests.helpers.patience import PATIENCE_SECONDS

HELD = """
import re, sys, threading, time
from amfm.pretrain.monitor.guard import Guard
seconds = 900.0
def beat():
    while True:
        guard.expect(seconds)
        time.sleep(0.1)
with Guard(3, 900.0) as guard:
    threading.Thread(target=beat, daemon=True).start()
    time.sleep(1)
    print("lives", flush=True)
    seconds = 1.0
    guard.expect(seconds)
    re.match(r"(a+)+$", "a" * 60 + "b")
"""
STARTS = """
import sys, time
from amfm.pretrain.monitor.guard import Guard
with Guard(0, 900.0, stop_seconds=1.0) as guard:
    report = guard.hearing(lambda what, *_: print(what, flush=True))
    report("part 0")
    hangs = sys.stdin.readline()
    print("hangs", flush=True)
    guard.start_seconds = float(hangs.strip() or 900.0)
    report("part 1")
    while hangs.strip():
        sys.setswitchinterval(100)
        time.sleep(1)
    guard.expect(None)
print("ended", flush=True)
"""


def start(code: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def looks(signs: Signs, until: float, *, stopped: bool = False) -> list[tuple[float, str] | None]:
    """What each look found until a second, from that of the look before on."""
    times = [signs.looked + LOOK_SECONDS * poll for poll in range(1, round((until - signs.looked) / LOOK_SECONDS) + 1)]
    return [signs.find_overdue(now, stopped) for now in times]


def test_parts_that_follow_each_other_within_their_time_are_no_hang_and_one_that_does_not_end_is() -> None:
    signs = Signs(120.0, now=0.0)
    assert set(looks(signs, 50.0)) == {None}, "nothing is asked of it yet"
    for second in (50.0, 53.0, 56.0):
        signs.take(b"4.000\n", second)
        assert set(looks(signs, second + 3.0)) == {None}
    assert looks(signs, 60.5) == [None, None, (4.5, "")]
    signs.take(b"0.000\n", 60.5)
    assert set(looks(signs, 90.0)) == {None}


def test_after_sigterm_the_next_sign_has_to_come_sooner() -> None:
    signs = Signs(2.0, now=0.0)
    signs.take(b"60.000\n", 0.0)
    signs.take(bytes([signal.SIGTERM]), 1.0)
    assert looks(signs, 2.5) == [None] * 4 + [(2.5, "after SIGTERM")]
    signs.take(b"60.000\n", 2.5)
    assert set(looks(signs, 60.0)) == {None}, "a sign of life after it was asked"


def test_a_rank_or_a_guard_that_was_stopped_gets_its_time_again() -> None:
    signs = Signs(2.0, now=0.0)
    signs.take(b"4.000\n", 0.0)
    assert set(looks(signs, 50.0, stopped=True)) == {None}
    assert set(looks(signs, 54.0)) == {None}
    assert signs.find_overdue(54.0 + 5 * LOOK_SECONDS, False) is None, "the guard itself did not look"
    assert looks(signs, 61.0)[-1] == (4.5, "")


def test_a_held_lock_of_python_ends_the_rank_with_its_stack() -> None:
    out, errors = (process := start(HELD)).communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, out) == (-signal.SIGABRT, "lives\n")
    assert "amfm: rank 3 on " in errors and ": no sign of life for " in errors
    assert "re/__init__.py" in errors, "where it holds the lock"


def test_a_start_that_makes_no_progress_is_ended() -> None:
    out, errors = (process := start(STARTS)).communicate("1.0\n", timeout=PATIENCE_SECONDS)
    assert process.returncode == -signal.SIGABRT and out.endswith("hangs\npart 1\n")
    assert "a part of the start does not end" in errors and 'File "<string>", line' in errors


def test_sigterm_ends_a_start_that_hangs_before_its_time() -> None:
    process = start("import signal; signal.signal(signal.SIGTERM, lambda *_: None)\n" + STARTS)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("600\n")
    process.stdin.flush()
    while process.stdout.readline() != "part 1\n":
        pass
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == -signal.SIGABRT and " s after SIGTERM: " in errors


def test_who_ends_in_order_is_left_alone_and_the_guard_ends_with_it() -> None:
    process = start(STARTS)
    assert process.stdout is not None
    process.stdout.readline()
    (child,) = psutil.Process(process.pid).children()
    assert not is_stopped(process.pid)
    os.kill(process.pid, signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    assert is_stopped(process.pid)
    os.kill(process.pid, signal.SIGCONT)
    out, errors = process.communicate("\n", timeout=PATIENCE_SECONDS)
    assert process.returncode == 0 and out.endswith("ended\n"), errors
    assert errors == "" and not child.is_running()


def test_the_guard_ends_with_a_rank_that_is_killed() -> None:
    process = start(STARTS)
    assert process.stdout is not None
    process.stdout.readline()
    (child,) = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs([child], timeout=PATIENCE_SECONDS)
    assert not alive


def test_a_signal_to_all_processes_of_a_step_ends_no_guard() -> None:
    """As Slurm sends them; without its guard a rank's own handling of the signal wrote a traceback."""
    command = [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), "0", "900"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    ignored = 0
    while not ignored >> (signal.SIGUSR1 - 1) & 1:  # until it has begun
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        ignored = next(int(line.split()[1], 16) for line in lines if line.startswith("SigIgn"))
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        process.send_signal(number)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(PATIENCE_SECONDS) == 0
