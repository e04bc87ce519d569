"""Reads what Megatron-Core saves apart from tensors, without running code: `common.pt` is a pickle of many types.

torch's own `weights_only` refuses the whole file for one argument of an unknown type. Here every unknown type becomes an
empty stand-in, and the numbers that an import needs are read.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from torch import Tensor

from amfm.data_pipeline.durable.foreign_files import take

# What rebuilds tensors and containers; nothing of it opens files or calls what a file names.
KNOWN = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_parameter"),
}


class Unread:
    """Stands in for an object of a type that is not read; takes any state and keeps none."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Keep nothing."""

    def __setstate__(self, _: Any) -> None:
        """Keep nothing."""

    def __call__(self, *_: Any, **__: Any) -> Unread:
        """Stand in for what it would make, too."""
        return self


class CommonReader(pickle.Unpickler):
    """An unpickler of tensors, containers, numbers and a program's arguments."""

    def find_class(self, module: str, name: str) -> Any:
        """Find what rebuilds tensors; arguments become a namespace, and any other name a stand-in."""
        if (module, name) == ("argparse", "Namespace"):
            return argparse.Namespace
        found = getattr(torch, name, None) if module in ("torch", "torch.storage") else None
        is_storage = isinstance(found, type) and name.endswith("Storage")
        if is_storage or isinstance(found, torch.dtype | torch.layout) or found is torch.Size:
            return found
        return super().find_class(module, name) if (module, name) in KNOWN else Unread


def read_common(path: Path) -> dict[str, Any]:
    """Read such a file; {} where there is none. Tensors are mapped, not read. Raises ValueError where the file is damaged or something else."""
    if not path.is_file():
        return {}
    try:
        found = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_Pickle, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a whole file of torch.save ({str(error)[:200]}); copy the folder again"
        ) from error
    return take({"common state": found}, "common state", dict, path)


def find_steps(optimizer: Any) -> Iterator[int]:
    """All counters of an optimizer's common state, wherever it keeps them."""
    children: Iterable[tuple[Any, Any]] = optimizer.items() if isinstance(optimizer, Mapping) else ()
    if isinstance(optimizer, list | tuple):
        children = enumerate(optimizer)
    for key, value in children:
        if key in ("common_step", "step") and isinstance(value, int | float | Tensor):
            yield int(value)
        else:
            yield from find_steps(value)


def _load(file: BinaryIO, **options: Any) -> Any:
    return CommonReader(file, **options).load()


# What torch.load asks of a module that unpickles for it.
_Pickle: Any = SimpleNamespace(Unpickler=CommonReader, load=_load, __name__="common")
