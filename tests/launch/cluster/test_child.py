"""Children of benchmarks and traces end with the command that started them, and say so where they end before."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from amfm.launch.cluster.child import Child
from tests.helpers.patience import PATIENCE_SECONDS

PARENT = """
from amfm.launch.cluster.child import Child
with Child("timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)") as child:
    print(child._process.pid, flush=True)
    child.receive()
"""


def is_running(process: Path) -> bool:
    """Whether the process of this folder of /proc is there, and not only its exit code."""
    try:
        return "\nState:\tZ" not in (process / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the kernel of Linux")
def test_a_child_ends_when_its_parent_is_killed():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = Path("/proc", parent.stdout.readline().strip())
        assert is_running(child)
        parent.kill()
    end = time.monotonic() + PATIENCE_SECONDS
    while is_running(child):
        assert time.monotonic() < end, "the child lives on"
        time.sleep(0.05)


def test_a_process_that_ended_is_an_error_of_whoever_asks_it() -> None:
    with Child("amfm.launch.no_such_module") as child:
        with pytest.raises(
            RuntimeError, match=r"python -m amfm.launch\.no_such_module ended early; its message is above"
        ):
            child.receive()
        with pytest.raises(RuntimeError, match="ended early"):
            child.start()
