"""What a launcher started ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil

from tests.helpers.patience import PATIENCE_SECONDS

LAUNCHER = (
    "import subprocess\n"
    "from amfm.launch.cluster.child import ending_with_us\n"
    "child = subprocess.Popen(ending_with_us(['sh', '-c', 'echo ready $$; exec sleep 3600']))\n"
    "child.wait()\n"
)


def test_a_child_ends_when_its_launcher_is_killed() -> None:
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    word, number = launcher.stdout.readline().split()
    child = psutil.Process(int(number))
    assert word == "ready" and child.ppid() == launcher.pid
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    gone, alive = psutil.wait_procs([child], timeout=PATIENCE_SECONDS)
    for process in alive:
        process.kill()
    assert gone == [child]
    launcher.stdout.close()
