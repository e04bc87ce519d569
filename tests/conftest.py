"""What holds for every test: one thread a process, because `make test` runs two workers on two cores."""

from __future__ import annotations

import os

# Before torch is imported, here and in every process that a test starts. Two threads on each of two workers would take each
# other's cores; a test that is about threads sets its own.
os.environ["OMP_NUM_THREADS"] = "1"
# Processes that tests start would compile our sources again and again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
