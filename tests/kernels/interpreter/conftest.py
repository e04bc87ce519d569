"""These tests run kernels: in Triton's interpreter, or compiled on a GPU.

Interpreting needs TRITON_INTERPRET=1 before Triton is imported, so `test_interpreter.py` runs them in a child. On a machine
with a GPU `pytest -m gpu tests/kernels/interpreter` runs the same tests on it: what they make, they make on the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from amfm.kernels.runtime.backend import INTERPRETED
from tests.helpers.made_on import MadeOn
from tests.kernels.quick.interpreter import quick_interpreter
from tests.kernels.twice import Twice, compute_once, compute_twice

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
def made_on_the_gpu() -> Iterator[None]:
    """On a GPU, move there what tests make without naming a device."""
    with MadeOn(torch.device("cuda")) if ON_CARD else nullcontext():
        yield


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """Interpret with less bookkeeping; `test_quick_interpreter.py` compares with and without."""
    with quick_interpreter() if INTERPRETED else nullcontext():
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    """Ask for a second computation of every case."""
    parser.addoption("--twice", action="store_true", help="compute every case of the interpreter's tests twice")


@pytest.fixture
def twice(request: pytest.FixtureRequest) -> Twice:
    """Computes something, and in some cases once more, bitwise identical.

    The interpreter runs programs one after the other in one order, and what they leave unwritten is poisoned: a second
    time shows what a launcher remembers from the first, which a fifth of the cases shows. On a GPU, and with --twice,
    each case is computed twice.
    """
    case = getattr(request.node, "callspec", None)
    some = case is None or sum(case.indices.values()) % 5 == 1
    return compute_twice if some or ON_CARD or request.config.getoption("--twice", default=False) else compute_once


@pytest.fixture(autouse=True)
def no_races() -> Iterator[None]:
    """Hold every launch of every test here to accesses that something orders."""
    if not INTERPRETED:
        yield
        return
    from tests.kernels.watch.races import find_races

    with find_races() as races:
        yield
    assert races == []
