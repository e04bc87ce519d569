"""Versions of what can change numbers: Python, libraries, and our own code, without importing any of it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from functools import cache
from pathlib import Path

LIBRARIES = ("amfm-pretrain", "torch", "deepspeed", "megatron-core", "numpy", "safetensors")
OWN_PACKAGES = ("launch", "pretrain", "model", "kernels", "data_pipeline")
OWN_CODE = "amfm's source files"
ROOT = Path(__file__).resolve().parent.parent


def collect_versions() -> dict[str, str]:
    """Collect the versions of Python and of libraries that can change numbers, and a digest of our code."""
    versions = {library: read_version(library) or "not installed as a distribution" for library in LIBRARIES}
    return {"python": platform.python_version()} | versions | {OWN_CODE: digest_code(ROOT)}


@cache
def read_version(library: str) -> str | None:
    """Look up the installed version of a distribution, None where it is missing. Read once a process."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def digest_code(root: Path) -> str:
    """Digest our packages' source files, 12 hex digits: two checkouts of one version may differ.

    Read once a process.
    """
    digest = hashlib.sha256()
    files = (path for package in OWN_PACKAGES for path in (root / package).rglob("*.*"))
    for path in sorted(path for path in files if path.suffix in (".py", ".c")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
