"""Lock files: held by one process, freed with it however it ends, and never a way to write somewhere else.

flock, because the kernel frees it when the process ends, killed or not: a file whose presence is the lock would have to be
judged by age. The file stays after the lock is freed; deleting it would let two processes lock two files of one name.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO


def take_lock(path: Path, *, wait: bool) -> IO[bytes] | None:
    """Hold a lock file until the result is closed; None when another process holds it and `wait` is false.

    The file is made if it is absent, and is never written or truncated: through a link that someone put in its place that
    would hit another file. A link is refused (OSError, ELOOP). The lock belongs to the open file, which a child inherits
    by fork but not over exec.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    lock = os.fdopen(descriptor, "r+b", buffering=0)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        lock.close()
        return None
    return lock
