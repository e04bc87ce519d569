"""Random numbers of tests: each test draws by its own name, so that it draws the same alone, in any order, on any worker.

PyTorch is imported when something is drawn: the process that starts the workers draws nothing, and its imports are 5 s of a
run of pytest.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy

# Devices by which the drivers of GPUs are there, as conftest.py looks for them.
HAS_GPU = any(Path("/dev", name).exists() for name in ("nvidiactl", "kfd"))


def seed_of(name: str, offset: int) -> int:
    """32 bits of a name; every offset gives other ones."""
    return int.from_bytes(hashlib.blake2b(f"{offset} {name}".encode(), digest_size=4).digest(), "big")


def seed_all(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch.

    Where there is no GPU, only that of the CPU: `torch.manual_seed` keeps the stack of every call, as text, for GPUs that are
    not in use yet: 0.75 ms, half of the least that a test takes here.
    """
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    if HAS_GPU:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw by a seed inside, and continue outside as if nothing had been drawn."""
    import torch

    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    seed_all(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
