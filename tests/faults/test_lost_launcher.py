"""kill -9 of the launcher: its ranks end with it, so that no orphan writes to the run directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.patience import PATIENCE_SECONDS

RANK = """
import os, sys, time
from pathlib import Path
from amfm.pretrain.parallel import die_with_launcher
die_with_launcher()
Path(sys.argv[1], os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(3600)
"""
LAUNCHER = """
import sys
from amfm.launch.cluster.local import run_command
run_command([sys.executable, "-W", "ignore", "-c", sys.argv[1], sys.argv[2]], 2)
"""


@pytest.mark.slow
def test_ranks_end_with_their_launcher(tmp_path: Path) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, RANK, str(tmp_path)])
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len([path for path in tmp_path.iterdir() if path.read_text()]) < 2:
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.1)
    ranks = [psutil.Process(int(path.read_text())) for path in tmp_path.iterdir()]
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    gone, alive = psutil.wait_procs(ranks, timeout=PATIENCE_SECONDS)
    for rank in alive:
        rank.kill()
    assert len(gone) == 2
