"""What holds for every test: one thread a process, because `make test` runs two workers on two cores."""

from __future__ import annotations

import gc
import os

# Before torch is imported, here and in every process that a test starts. Two threads on each of two workers would take each
# other's cores; a test that is about threads sets its own.
os.environ["OMP_NUM_THREADS"] = "1"
# Imports make a million objects that stay: rounds of the garbage collector between them find nothing.
gc.disable()
# Processes that tests start would compile our sources again and again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_collection_finish() -> None:
    """Garbage is collected again, and what imports and collection made is left out of its rounds: it stays to the end."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """What was left out joins again, or libraries would find it leaked at the interpreter's end."""
    gc.unfreeze()
