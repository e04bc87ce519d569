"""These tests run kernels: in Triton's interpreter, or compiled on a GPU.

Interpreting needs TRITON_INTERPRET=1 before Triton is imported, so `test_interpreter.py` runs them in a child. On a machine
with a GPU `pytest -m gpu tests/kernels/interpreter` runs the same tests on it: what they make, they make on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from triton import language
from triton.runtime import interpreter

from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.runtime.interpreter import replace_methods
from tests.helpers.made_on import MadeOn
from tests.kernels.interpreter.quick_interpreter import quick_interpreter

ON_CARD = not INTERPRETED and torch.cuda.is_available()
# What is about the interpreter itself: its counts, its races, its rounding, its speed, tiles timed by a given clock.
ABOUT_THE_INTERPRETER = [
    "test_counting.py",
    "test_emulation.py",
    "test_quick_interpreter.py",
    "test_races.py",
    "test_tuning.py",
]
collect_ignore_glob = [] if INTERPRETED else ABOUT_THE_INTERPRETER if ON_CARD else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU, mark this folder's tests for it."""
    for item in items:
        if ON_CARD and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def made_on_the_card() -> Iterator[None]:
    """On a GPU, move there what tests make without naming a device."""
    with MadeOn(torch.device("cuda")) if ON_CARD else nullcontext():
        yield


@pytest.fixture(autouse=True, scope="session")
def patched_once_a_launch() -> Iterator[None]:
    """Put the interpreter's functions into Triton's modules once a launch, not again at every call of a device function.

    The interpreter does the latter (Triton 3.4 to 3.9), finds everything in its place, and takes two fifths of the time of
    these tests for it. A kernel sees `triton.language`; functions of Triton's own library see `triton.language.core`.
    """
    if not INTERPRETED:
        yield
        return
    patch = interpreter._patch_lang
    patched: set[str] = set()  # in the launch that runs; empty between launches

    def patch_once(function: Callable[..., None]) -> interpreter._LangPatchScope:
        seen = _language_modules(function)
        if patched and seen <= patched:
            return interpreter._LangPatchScope()  # nothing to restore
        scope = patch(function)
        if not patched:
            restore = scope.restore

            def end() -> None:
                patched.clear()
                restore()

            scope.restore = end
        patched.update(seen)
        return scope

    with replace_methods(interpreter, {"_patch_lang": patch_once}):
        yield


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """Interpret with less bookkeeping; `test_quick_interpreter.py` compares with and without."""
    with quick_interpreter() if INTERPRETED else nullcontext():
        yield


@cache
def _language_modules(function: Callable[..., None]) -> frozenset[str]:
    """Which of the modules that the interpreter changes a function can name."""
    modules = (value for value in function.__globals__.values() if isinstance(value, ModuleType))
    return frozenset(module.__name__ for module in modules if module in (language, language.core))


@pytest.fixture(autouse=True)
def no_races() -> Iterator[None]:
    """Hold every launch of every test here to accesses that something orders."""
    if not INTERPRETED:
        yield
        return
    from tests.kernels.interpreter.races import find_races

    with find_races() as races:
        yield
    assert races == []
