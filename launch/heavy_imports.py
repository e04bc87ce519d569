"""Imports of PyTorch, DeepSpeed and Megatron-core without rounds of Python's garbage collector between them.

They make a million objects that stay to the end. The collector looks through the young ones again and again and finds nothing,
which is 2.2 of a rank's 7.4 seconds before its first step.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

from amfm.data_pipeline.terminal import Waiting
from amfm.launch.rank_command import choose_wait_policy


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Inside the block nothing is collected; afterwards as before."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def loading(verb: str, what: str = "PyTorch") -> Iterator[None]:
    """Heavy imports of a verb, which says so where they take longer than a second."""
    with Waiting(f"amfm {verb}") as waiting, heavy_imports():
        waiting(f"loading {what}")
        choose_wait_policy(os.environ)
        yield
