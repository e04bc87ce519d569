"""Command lines of ranks and of every other amfm process, started apart from the working directory.

`python -m amfm.launch` looks into the working directory first, and would run a user's `amfm.py` or `amfm/`, a clone of this
repository say, in the place of ours, on every rank. `-P` turns that off (PYTHONPATH and installed packages, editable ones too, stay). Where our
packages were themselves found through the working directory alone, a source tree without installation, PYTHONPATH names
it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2].resolve()


def isolated_python() -> list[str]:
    """Start of a command line for a Python that does not search the working directory."""
    return [sys.executable, "-P"]


def rank_command(arguments: Sequence[str]) -> list[str]:
    """Command line of a process that runs an `amfm` command line."""
    return [*isolated_python(), "-m", "amfm.launch", *arguments]


def source_variables() -> dict[str, str]:
    """Environment variables that such a command needs besides those that are set; empty for an installed amfm."""
    others = {Path(entry).resolve() for entry in sys.path[1:] if entry}
    if sys.flags.safe_path or ROOT in others or Path(sys.path[0] or os.curdir).resolve() != ROOT:
        return {}
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{ROOT}{os.pathsep}{before}" if before else str(ROOT)}
