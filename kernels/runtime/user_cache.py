"""Where this user keeps what was found out on a machine: tuned tiles, kernels that have been checked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def user_folder(name: str) -> Path | None:
    """A folder of this name in the user's cache; None on a machine without a home directory (containers, batch systems)."""
    cache = os.environ.get("XDG_CACHE_HOME")
    base = Path(cache) if cache else Path("~/.cache")
    try:
        return base.expanduser() / "amfm" / name
    except RuntimeError:
        return None


def write_whole(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all, its folder with it. Raises OSError where it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(path)
