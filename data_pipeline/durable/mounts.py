"""On which kind of file system a folder lies, by the kernel's table of mounts."""

from __future__ import annotations

from pathlib import Path

MOUNTS = Path("/proc/mounts")


def read_mounts() -> str:
    """Table of mounts; empty where the system has none."""
    return MOUNTS.read_text(encoding="utf-8", errors="replace") if MOUNTS.exists() else ""


def file_system_of(path: Path, mounts: str) -> str:
    """Type of the file system that holds an absolute path, by a table like /proc/mounts; empty without a match."""
    best, kind = -1, ""
    for line in mounts.splitlines():
        _, point, found, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        # Of two mounts on one point the later one is what is seen.
        if path.is_relative_to(point) and len(point) >= best:
            best, kind = len(point), found
    return kind
