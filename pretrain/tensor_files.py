"""Safetensors files that somebody else may have written: what is cut or damaged gives one message that names the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor


@contextmanager
def open_tensors(path: Path, error: Callable[[str], Exception] = ValueError) -> Iterator[Any]:
    """Open a safetensors file for reading; raises the error asked for when it is cut or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as problem:
        raise error(f"{path}: is not a whole safetensors file ({problem})") from problem


def read_tensors(path: Path, error: Callable[[str], Exception] = ValueError) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, by name, on the CPU; raises as `open_tensors`."""
    with open_tensors(path, error) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict, can't be iterated
