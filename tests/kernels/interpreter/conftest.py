"""These tests need TRITON_INTERPRET=1 before Triton is imported, so `test_interpreter.py` runs them in a child."""

from __future__ import annotations

from kernels.backend import INTERPRETED

collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]
