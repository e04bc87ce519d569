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
print(len(os.read(reading, 9)), len(memory.raw.lstrip(b"x")), size)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="LD_PRELOAD")
def test_a_signal_s_handler_needs_less_than_half_of_its_stack(tmp_path: Path) -> None:
    rules = [fault("write", f"{tmp_path}/*", error, when=tmp_path / "on") for error in ("ENOSPC", "EIO")]
    done = subprocess.run(
        [sys.executable, "-c", HANDLER],
        env=os.environ | fault_variables(rules),
        capture_output=True,
        text=True,
        check=True,
    )
    bytes_written, used, size = map(int, done.stdout.split())
    assert bytes_written == 1 and 0 < used < size / 2
