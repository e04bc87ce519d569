"""The library of disk.c, a disk that misbehaves on order: built once a machine, and the variables that bring it in.

It stands in front of the C library of a real process (LD_PRELOAD), so Python, safetensors and everything else meet its
errors where they would meet those of a disk.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("disk.c")


@functools.cache
def build_library() -> Path:
    """Compile disk.c, unless that was done before, and return the library. Raises RuntimeError if it cannot be."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        raise RuntimeError("a disk that fails on order needs Linux and a C compiler; install gcc")
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    # A folder that others may write to would let them plant a library.
    folder = Path(tempfile.gettempdir(), f"amfm-disk-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o077 or folder.is_symlink():
        raise RuntimeError(f"{folder} belongs to someone else, or others may write to it; remove it")
    library = folder / f"{digest}.so"
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [compiler, "-O1", "-shared", "-fPIC", "-w", "-o", str(made), str(SOURCE), "-lpthread"], check=True
        )
        os.replace(made, library)
    return library


def fault(operation: str, pattern: str, error: str, *, after: int = 0, when: Path | None = None) -> str:
    """Write a rule by the name of an error (ESTALE), or an effect in the words of disk.c (sleep=3, ignore)."""
    effect = f"errno={getattr(errno, error)}" if error.isupper() else error
    return f"{operation} {pattern} after={after} {f'when={when} ' if when else ''}{effect}"


def fault_variables(rules: Sequence[str]) -> dict[str, str]:
    """Environment variables of a process that meets these faults."""
    return {"LD_PRELOAD": str(build_library()), "AMFM_FAULTS": ";".join(rules)}
