"""Memory of processes that ask for arrays of the same sizes again and again, or make many small objects at once."""

from __future__ import annotations

import ctypes
import gc
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# mallopt(3): the free memory at which the heap shrinks, and how many requests may be served by their own maps.
TRIM_THRESHOLD, MMAP_MAX = -1, -4
KEPT_BYTES = 2**30
OWN_SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, and say whether it does.

    On its own it gives large blocks back at once and maps them again for the next request, a page fault every 4 KiB: a
    fifth of a float32 training step on a CPU. False if there is another C library, or where the environment has its
    own settings (OWN_SETTINGS), which stay as they are.
    """
    if any(name in os.environ for name in OWN_SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(MMAP_MAX, 0)) and bool(mallopt(TRIM_THRESHOLD, KEPT_BYTES))


def available_bytes() -> int | None:
    """Memory that programs of this host can still take, with what caches hold; None if Linux does not say."""
    file = Path("/proc/meminfo")
    found = (
        re.search(r"^MemAvailable: +(\d+) kB", file.read_text(encoding="ascii"), re.MULTILINE)
        if file.is_file()
        else None
    )
    return None if found is None else 1024 * int(found[1])


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """For making many objects that stay: to look for garbage among them takes longer, and grows with their square."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
