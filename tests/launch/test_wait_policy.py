"""How threads wait is chosen before PyTorch is loaded, from what other programs use."""

import os
import subprocess
import sys

import pytest

CHOOSE = """
import sys, time
from amfm.launch import rank_command
time.sleep(0.3)
for threads, *pairs in eval(sys.argv[1]):
    environment = dict(pair.split("=") for pair in pairs)
    print(rank_command.choose_wait_policy(environment, 1, threads), environment.get("OMP_WAIT_POLICY"))
"""
DECIDED = ((1,), (None, "OMP_WAIT_POLICY=active"), (None, "GOMP_SPINCOUNT=5"), (None, "RANK=0"))


def choose(*cases):
    """The lines and the variable of a program that starts now, for threads and variables each."""
    answer = subprocess.run([sys.executable, "-c", CHOOSE, str(cases)], check=False, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.splitlines()


@pytest.fixture
def busy_processors():
    """Another program on each processor, so that any machine is busy."""
    count = len(os.sched_getaffinity(0))
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    yield count
    for program in programs:
        program.kill()
        program.wait()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux' processor times")
def test_threads_sleep_next_to_other_programs_unless_the_user_or_a_launcher_decided(busy_processors):
    line, *others = choose((None,), *DECIDED)
    if busy_processors > 1:
        assert line.startswith("other programs use ") and line.endswith("(OMP_WAIT_POLICY) passive"), line
    assert len(others) == len(DECIDED) and not any(each.startswith("other") for each in others), others


def test_few_threads_on_many_processors_spin_as_before(monkeypatch):
    from amfm.launch import rank_command

    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(rank_command.os, "sched_getaffinity", lambda _: range(64))
    monkeypatch.setattr(rank_command, "measure_others", lambda _: 3.0)
    environment = {}
    assert rank_command.choose_wait_policy(environment, 2, 4) == "" and not environment
