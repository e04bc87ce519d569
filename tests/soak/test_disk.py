"""The library in front of a process's C library takes nothing that the process would miss."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak.disk import fault, fault_variables

# A handler's stack as faulthandler makes it, on the heap: what a handler writes below it is of someone else.
HANDLER = """
import ctypes, os, signal
AT_MINSIGSTKSZ, SIGSTKSZ, BELOW = 51, 8192, 65536
libc = ctypes.CDLL(None)
libc.getauxval.restype = ctypes.c_ulong
size = SIGSTKSZ + libc.getauxval(AT_MINSIGSTKSZ)
memory = ctypes.create_string_buffer(b"x" * (BELOW + size), BELOW + size)
class Stack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
libc.sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory) + BELOW, 0, size)), None)
reading, writing = os.pipe()
os.set_blocking(writing, False)
signal.set_wakeup_fd(writing)
signal.signal(signal.SIGTERM, lambda *_: None)
os.kill(os.getpid(), signal.SIGTERM)
print(len(os.read(reading, 9)), len(memory.raw.lstrip(b"x")), SIGSTKSZ)
"""


def stack_used(directory: Path, *, faults: bool) -> tuple[int, int]:
    """Bytes of its stack that a handler used, the kernel's frame with it, and the room that faulthandler adds to that."""
    rules = [fault("write", f"{directory}/*", error, when=directory / "on") for error in ("ENOSPC", "EIO")]
    done = subprocess.run(
        [sys.executable, "-c", HANDLER],
        env=os.environ | (fault_variables(rules) if faults else {}),
        capture_output=True,
        text=True,
        check=True,
    )
    bytes_written, used, room = map(int, done.stdout.split())
    assert bytes_written == 1 and used > 0
    return used, room


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="LD_PRELOAD")
def test_the_library_needs_less_than_half_of_a_signal_handler_s_stack(tmp_path: Path) -> None:
    # The kernel's frame and the loader's first look-up save all registers, 1.6 KiB each or more as the processor has them:
    # both are there without the library too.
    without, room = stack_used(tmp_path, faults=False)
    used, _ = stack_used(tmp_path, faults=True)
    assert used - without < room / 2
