"""Reads what Megatron-Core saves apart from tensors, without running code: `common.pt` is a pickle of many types.

torch's own `weights_only` refuses the whole file for one argument of an unknown type. Here every unknown type becomes an
empty stand-in, and the numbers that an import needs are read.
"""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch

from amfm.data_pipeline.durable.foreign_files import take
from amfm.pretrain.exchange.dcp_folder import Unread

# What rebuilds tensors and containers; nothing of it opens files or calls what a file names.
KNOWN = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_parameter"),
}


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
    """Read the common state; {} where there is none. Raises ValueError where the file is damaged or something else."""
    if not path.is_file():
        return {}
    try:
        found = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_Pickle)
    except (RuntimeError, pickle.UnpicklingError, EOFError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a whole file of torch.save ({str(error)[:200]}); copy the folder again"
        ) from error
    return take({"common state": found}, "common state", dict, path)


def _load(file: BinaryIO, **options: Any) -> Any:
    return CommonReader(file, **options).load()


# What torch.load asks of a module that unpickles for it.
_Pickle: Any = SimpleNamespace(Unpickler=CommonReader, load=_load, __name__="common")
