"""Reads what Megatron-Core and DeepSpeed save apart from tensors, without running code: a pickle of many types.

torch's `weights_only` refuses a whole file for one argument of an unknown type. Here every name that it doesn't know becomes
an empty stand-in, and the numbers that an import needs are read. TorchScript archives, which torch would run, are refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amfm.data_pipeline.durable.foreign_files import take
from amfm.pretrain.exchange.torch_file import UNREADABLE


class Unread:
    """Stands in for an object of a type that is not read; takes any state and keeps none."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Keep nothing."""

    def __setstate__(self, _: Any) -> None:
        """Keep nothing."""

    def __call__(self, *_: Any, **__: Any) -> Unread:
        """Stand in for what it would make, too."""
        return self

    def __eq__(self, other: object) -> bool:
        """Equal to its class: torch asks whether what a pickle calls is among the names that it was given."""
        return other is Unread or isinstance(other, Unread)

    def __hash__(self) -> int:
        """One for all, as they are equal."""
        return hash(Unread)


def read_common(path: Path) -> dict[str, Any]:
    """Read such a file; {} where there is none. Tensors are mapped, not read. Raises ValueError where the file is damaged or something else."""
    if not path.is_file():
        return {}
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stand_ins: list[Any] = [(Unread, name) for name in unknown if name != "argparse.Namespace"]
        with torch.serialization.safe_globals([*stand_ins, argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UNREADABLE as error:
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
