"""What becomes of freed memory, in processes that ask for the same arrays again and again."""

from __future__ import annotations

import ctypes

# mallopt(3): the free memory at which the heap shrinks, and the largest request that is served from it.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGEST_ON_HEAP_BYTES = 32 * 2**20  # glibc's limit; the arrays of a part of 8 MB of text are smaller
KEPT_BYTES = 2**30


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: to give it back and map it anew for the next part costs a page fault every 4 KiB.

    Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGEST_ON_HEAP_BYTES)
        mallopt(TRIM_THRESHOLD, KEPT_BYTES)
