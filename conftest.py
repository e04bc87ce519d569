"""What holds for every test, those of examples too: one thread per process, and random numbers drawn by the test's name."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

# Before torch is imported, here and in every process that a test starts. Two threads on each of three workers would take
# each other's cores; a test that is about threads sets its own, and tests/processors.py gives all others another number.
os.environ["OMP_NUM_THREADS"] = os.environ.get("AMFM_TEST_THREADS", "1")
# DeepSpeed has PyTorch look for NVIDIA's library at each question for GPUs, which takes 0.2 ms where there is none.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "0")
# Imports make a million objects that stay: rounds of the garbage collector between them find nothing.
gc.disable()
# Processes that tests start would compile our sources again and again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Packages of examples, as if they were installed: before amfm is imported, here and in every process of a test.
PACKAGES = (
    "mixers",
    "foreign_states",
    "clients",
    "simulate",
    "convert",
    "tasks",
    "compact",
    "prometheus",
    "replay",
    "serve",
    "profile",
    "synthetic",
)
for folder in (*(f"examples/{name}" for name in PACKAGES), "tests/helpers/installed"):
    place = str(Path(__file__).parent / folder)
    sys.path.append(place)
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*filter(None, known), place]))

import pytest  # noqa: E402

from tests.helpers.seeds import seed_of, seeded  # noqa: E402

pytest_plugins = ["tests.helpers.processes.processor"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Ask for other random numbers than those that every run draws."""
    parser.addoption("--seed-offset", type=int, default=0, metavar="N", help="draw other random numbers in every test")


@pytest.fixture(autouse=True)
def seeds(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed each test by its name; what hypothesis draws too."""
    seed = seed_of(request.node.nodeid, request.config.getoption("seed_offset"))
    if getattr(request.function, "is_hypothesis_test", False):
        sys.modules["hypothesis"].seed(seed)(request.function)
    with seeded(seed):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    """Seed what several tests share by its own name: it is the same whichever of them comes first."""
    if fixturedef.scope == "function":
        return (yield)
    name = f"{fixturedef.baseid}::{fixturedef.argname}[{request.param_index}]"
    with seeded(seed_of(name, request.config.getoption("seed_offset"))):
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests, and those of a real cluster, hang after an hour: minutes become many on a busy machine."""
    for item in items:
        if item.get_closest_marker("slow") or item.get_closest_marker("cluster"):
            item.add_marker(pytest.mark.timeout(3600))


def pytest_collection_finish() -> None:
    """Garbage is collected again, and what imports and collection made is left out of its rounds: it stays to the end.

    At the interpreter's end it joins again, or libraries would report it as leaked; not before, as pytest's last rounds would
    take as long as many a file of tests.
    """
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)
