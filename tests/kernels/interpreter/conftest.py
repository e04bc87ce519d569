"""These tests need TRITON_INTERPRET=1 before Triton is imported, so `test_interpreter.py` runs them in a child."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType

import pytest
from triton import language
from triton.runtime import interpreter

from kernels.backend import INTERPRETED
from kernels.interpreter import replace_methods

collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def patched_once_a_launch() -> Iterator[None]:
    """Put the interpreter's functions into Triton's modules once a launch, not again at every call of a device function.

    The interpreter does the latter (Triton 3.4 to 3.9), finds everything in its place, and takes two fifths of the time of
    these tests for it. A kernel sees `triton.language`; functions of Triton's own library see `triton.language.core`.
    """
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


@cache
def _language_modules(function: Callable[..., None]) -> frozenset[str]:
    """Which of the modules that the interpreter changes a function can name."""
    modules = (value for value in function.__globals__.values() if isinstance(value, ModuleType))
    return frozenset(module.__name__ for module in modules if module in (language, language.core))


@pytest.fixture(autouse=True)
def no_races() -> Iterator[None]:
    """Hold every launch of every test here to accesses that something orders."""
    from kernels.proof.races import find_races

    with find_races() as races:
        yield
    assert races == []
