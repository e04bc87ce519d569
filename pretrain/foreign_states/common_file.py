"""Reads what Megatron-Core and DeepSpeed save apart from tensors, without running code: a pickle of many types.

torch's `weights_only` rejects a whole file for one argument of an unknown type. Here every name that it does not know becomes
an empty stand-in, and the numbers that an import needs are read. TorchScript archives, which torch would run, are rejected.

Fits tensors of another format to the parameters of a model: all of them are there, in their shapes, and nothing else is.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amfm.data_pipeline.durable.foreign_files import take
from amfm.model.on_demand import OnDemand, Shape, Source
from amfm.pretrain.engine.moments import moments_of
from amfm.pretrain.foreign_states.torch_file import UNREADABLE

BUFFER = "buffer"
MAX_FAULTS = 8
# From kind (`weight`, a moment, `buffer`) and name to the key that a format has for it.
KeyOf = Callable[[str, str], str]
# Master weights and moments by kind and name, and buffers.
Fitted = tuple[dict[str, dict[str, Source]], dict[str, Source]]


def fit_tensors(
    found: OnDemand,
    key_of: KeyOf,
    where: str,
    *,
    shapes: Mapping[str, Shape],
    labels: Mapping[str, str],
    buffers: Mapping[str, Shape],
    ignored: Collection[str] = (),
) -> Fitted:
    """Find master weights and moments, by kind and name, and buffers under the keys of a format.

    `labels`: of the parameters' groups, which say what moments each has. Raises ValueError naming what is missing, surplus
    (`ignored` aside) or of another shape, in the format's keys.
    """
    keys = {
        key_of(kind, name): (kind, name, shape)
        for name, shape in shapes.items()
        for kind in ("weight", *moments_of(labels[name]))
    }
    keys |= {key_of(BUFFER, name): (BUFFER, name, shape) for name, shape in buffers.items()}
    faults = [f"{key} is missing" for key in keys if key not in found]
    faults += [
        f"{key} is {list(found.shape(key))}, the model states {list(shape)}"
        for key, (_, _, shape) in keys.items()
        if key in found and found.shape(key) != shape
    ]
    faults += [f"{key} does not belong" for key in sorted(found.keys() - keys.keys() - set(ignored))]
    if faults:
        more = f" and {len(faults) - MAX_FAULTS} more" if len(faults) > MAX_FAULTS else ""
        raise ValueError(
            f"{where} does not fit the model: looked for {len(keys)} tensors, found {len(found)}; "
            f"{'; '.join(faults[:MAX_FAULTS])}{more}"
        )
    fitted: dict[str, dict[str, Source]] = {}
    for key, (kind, name, _) in keys.items():
        fitted.setdefault(kind, {})[name] = found.sources[key]
    return fitted, fitted.pop(BUFFER, {})


def shapes_of(entries: Mapping[str, Mapping[str, list[int]]]) -> dict[str, Shape]:
    """Shapes of the parameters or buffers that a record describes."""
    return {name: tuple(entry["shape"]) for name, entry in entries.items()}


def one_step(steps: set[int], where: object) -> int:
    """The optimizer's counter, which all parameters must share. Raises ValueError if they do not."""
    if len(steps) != 1:
        raise ValueError(f"{where}: parameters were stepped {sorted(steps)} times; a run has one number for all")
    return steps.pop()


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
    """Read such a file; {} if there is none. Tensors are mapped, not read. Raises ValueError if the file is damaged or something else."""
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
