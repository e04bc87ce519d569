"""Safetensors files: what is cut, damaged or cannot be written gives one message that names the file.

The library raises errors of a kind of its own, for files of somebody else that it cannot read and for a full disk alike.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
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


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write contiguous tensors that share no memory to one file. Raises OSError with the path, RuntimeError without a number."""
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as problem:
        number = re.search(r"os error (\d+)", str(problem))
        if number is None:
            raise RuntimeError(f"{path}: cannot be written ({problem})") from problem
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from problem
