"""Random state of one rank as tensors: torch on the CPU and on the device, numpy, Python.

Tensors, because they go into the rank's safetensors file; JSON inside, because unpickling a file runs code.
"""

from __future__ import annotations

import json
import random
from typing import Any

import numpy
import torch
from torch import Tensor


def collect_random_state() -> dict[str, Tensor]:
    """Copy the states of all generators that a rank may draw from, as bytes."""
    numpy_state: Any = numpy.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    version, numbers, gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": encode_json(numpy_state),
        "python": encode_json([version, list(numbers), gauss]),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_state(states: dict[str, Tensor]) -> None:
    """Restore the generators from collected states; a CUDA state is dropped if there is no CUDA."""
    torch.set_rng_state(states["torch"])
    numpy_state = decode_json(states["numpy"])
    numpy_state["state"]["key"] = numpy.array(numpy_state["state"]["key"], dtype=numpy.uint32)
    numpy.random.set_state(numpy_state)
    version, numbers, gauss = decode_json(states["python"])
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def encode_json(value: Any) -> Tensor:
    """Encode a value as JSON in a tensor of bytes (JSON writes floats so that they read back exactly)."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def decode_json(encoded: Tensor) -> Any:
    """Decode what `encode_json` encoded."""
    return json.loads(bytes(encoded.tolist()))
