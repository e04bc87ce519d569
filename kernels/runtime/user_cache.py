"""Where this user keeps what was found out on a machine: tuned tiles, kernels that have been checked."""

from __future__ import annotations

import functools
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

_LOG = logging.getLogger(__name__)


def user_folder(name: str) -> Path | None:
    """A folder of this name in the user's cache; None on a machine without a home directory (containers, batch systems)."""
    cache = os.environ.get("XDG_CACHE_HOME")
    base = Path(cache) if cache else Path("~/.cache")
    try:
        return base.expanduser() / "amfm" / name
    except RuntimeError:
        return None


def scratch_folder(name: str) -> Path | None:
    """A folder of this name below `$TMPDIR` (`/tmp` by default) that only this user can write; None if there is none.

    Others may write there: a folder that is a link, or of another user, is not used.
    """
    own = Path(tempfile.gettempdir()) / f"amfm-{os.getuid()}"
    try:
        own.mkdir(mode=0o700, exist_ok=True)
        facts = own.lstat()
    except OSError:
        return None
    is_ours = own.is_dir() and not own.is_symlink() and facts.st_uid == os.getuid() and not facts.st_mode & 0o022
    return own / name if is_ours else None


def can_write(folder: Path) -> bool:
    """Whether a file can be written to a folder, which is made where it does not exist.

    By writing one: permission bits say nothing of read-only mounts and quotas.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"one block")
            file.flush()
    except OSError:
        return False
    return True


@functools.cache
def place_triton_cache() -> None:
    """Set TRITON_CACHE_DIR to the user's cache, or to `$TMPDIR`, where it is not set and Triton cannot write to its default.

    Triton would end the first launch with an OSError. Warns once where it says another folder, or finds none.
    """
    if os.environ.get("TRITON_CACHE_DIR"):
        return
    default = Path(os.environ.get("TRITON_HOME") or os.path.expanduser("~")) / ".triton" / "cache"
    if can_write(default):
        return
    for folder in (user_folder("triton"), scratch_folder("triton")):
        if folder is not None and can_write(folder):
            os.environ["TRITON_CACHE_DIR"] = str(folder)
            _LOG.warning("%s cannot be written: compiled kernels go to %s (TRITON_CACHE_DIR)", default, folder)
            return
    _LOG.warning("Triton needs a folder for compiled kernels, and %s cannot be written; set TRITON_CACHE_DIR", default)


def write_whole(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all, its folder with it. Raises OSError if it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.unlink(missing_ok=True)  # whatever it is: a link is not followed
    with partial.open("x") as file:
        json.dump(content, file, indent=1)
    partial.replace(path)
