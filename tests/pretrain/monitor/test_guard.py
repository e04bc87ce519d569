"""A rank in which no Python can run any more is ended from outside, with its stacks; one that is stopped gets its time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

HELD = """
import re, sys, threading, time
from amfm.pretrain.monitor.guard import Guard
def beat():
    while True:
        guard.expect(4.0)
        time.sleep(0.1)
with Guard(3, 60.0) as guard:
    threading.Thread(target=beat, daemon=True).start()
    time.sleep(2)
    print("lives", flush=True)
    re.match(r"(a+)+$", "a" * 60 + "b")
"""
STARTS = """
import sys, time
from amfm.pretrain.monitor.guard import Guard
with Guard(0, 4.0, stop_seconds=2.0) as guard:
    report = guard.hearing(lambda what, *_: print(what, flush=True))
    for part in range(4):
        report(f"part {part}")
        time.sleep(1.2)
    hangs = sys.stdin.readline()
    guard.expect(60.0 if "signal" in hangs else 4.0)
    print("hangs", flush=True)
    while hangs.strip():
        sys.setswitchinterval(100)
        time.sleep(1)
    guard.expect(None)
    time.sleep(2)
print("ended", flush=True)
"""


def start(code: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_a_held_lock_of_python_ends_the_rank_with_its_stack() -> None:
    out, errors = (process := start(HELD)).communicate(timeout=60)
    assert (process.returncode, out) == (-signal.SIGABRT, "lives\n")
    assert "amfm: rank 3 on " in errors and ": no sign of life for " in errors
    assert "re/__init__.py" in errors, "where it holds the lock"


def test_a_start_that_makes_no_progress_is_ended_and_one_that_does_is_not() -> None:
    out, errors = (process := start(STARTS)).communicate("hang\n", timeout=60)
    assert process.returncode == -signal.SIGABRT and out.endswith("part 3\nhangs\n")
    assert "a part of the start does not end" in errors and 'File "<string>", line' in errors


def test_sigterm_ends_a_start_that_hangs_before_its_time() -> None:
    process = start("import signal; signal.signal(signal.SIGTERM, lambda *_: None)\n" + STARTS)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("signal\n")
    process.stdin.flush()
    while process.stdout.readline() != "hangs\n":
        pass
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGABRT and " s after SIGTERM: " in errors


@pytest.mark.parametrize("stop", [True, False])
def test_who_ends_in_order_and_who_was_stopped_is_left_alone(stop: bool) -> None:
    process = start(STARTS)
    assert process.stdout is not None
    process.stdout.readline()
    (child,) = psutil.Process(process.pid).children()
    if stop:
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(2)
        os.kill(process.pid, signal.SIGCONT)
    out, errors = process.communicate("\n", timeout=60)
    assert process.returncode == 0 and out.endswith("ended\n"), errors
    assert errors == "" and not child.is_running()


def test_the_guard_ends_with_a_rank_that_is_killed() -> None:
    process = start(STARTS)
    assert process.stdout is not None
    process.stdout.readline()
    (child,) = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs([child], timeout=10)
    assert not alive
