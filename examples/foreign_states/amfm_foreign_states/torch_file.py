"""Tensors in files of `torch.save`, written and read some rows at a time.

torch can leave out the bytes of a tensor while it saves the rest of a file (`skip_data`), and tells where they belong when
the file is loaded under a fake mode: so a tensor larger than memory goes out and comes in by blocks, and the file stays
one that `torch.load` reads.

Reads what Megatron-Core and DeepSpeed save apart from tensors, without running code: a pickle of many types.

torch's `weights_only` rejects a whole file for one argument of an unknown type. Here every name that it does not know becomes
an empty stand-in, and the numbers that an import needs are read. TorchScript archives, which torch would run, are rejected.

Fits tensors of another format to the parameters of a model: all of them are there, in their shapes, and nothing else is.
"""

from __future__ import annotations

import argparse
import math
import pickle
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.api import CheckpointException

from amfm.data_pipeline.durable.files import named
from amfm.data_pipeline.durable.json_files import take
from amfm.model.on_demand import BLOCK_NUMEL, OnDemand, Shape, Source, cut_rows
from amfm.pretrain.engine.adamw import moments_of
from amfm.pretrain.tensor_files import tensor_bytes

PARAM = "param"
# What torch and its unpickler raise for files that are damaged or something else.
UNREADABLE = (
    *(RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, TypeError, AttributeError, LookupError),
    *(AssertionError, ArithmeticError, MemoryError, struct.error),
)
READ_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Inside, what torch's writers make of an error of the system is that error again, with this path where it has none."""
    try:
        with named(path):
            yield
    except (RuntimeError, CheckpointException) as error:
        first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        reason: BaseException | None = first
        while reason is not None and not isinstance(reason, OSError):
            reason = reason.__cause__ or reason.__context__
        with named(path):
            raise reason or first from None


def save_file(value: Any, path: Path) -> None:
    """`torch.save` through a file of Python's: torch's own loses which error the system had."""
    with system_errors(path), path.open("wb") as file:
        torch.save(value, file)


def write_param(path: Path, source: Source, extras: Mapping[str, Any]) -> None:
    """Write `{"param": tensor}` and what else is to say; one larger than a block goes out by blocks of rows, without a checksum in the archive."""
    if math.prod(source.shape) <= BLOCK_NUMEL:
        save_file({PARAM: source.read(0, source.num_rows).clone(), **extras}, path)
        return
    with FakeTensorMode():
        empty = torch.empty(source.shape, dtype=source.dtype)
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        save_file({PARAM: empty, **extras}, path)
    _, start = find_numbers(path, path)
    with named(path), path.open("r+b") as file:
        file.seek(start)
        for first, last in cut_rows(source.num_rows, source.shape):
            file.write(tensor_bytes(source.read(first, last)))


def read_param(path: Path) -> Source:
    """The tensor of such a file as rows on demand, in float32.

    Raises ValueError if the file is cut or damaged, or holds something else.
    """
    tensor, begin = find_numbers(path, path)
    shape, dtype = tuple(tensor.shape), tensor.dtype
    if dtype not in READ_TYPES:
        raise ValueError(f"{path} holds {dtype}, not floating-point numbers; give a universal checkpoint")
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    if path.stat().st_size < begin + tensor.nbytes:
        raise ValueError(f"{path} is cut: it has {path.stat().st_size} bytes, {begin + tensor.nbytes} are in use")

    def read(first: int, last: int) -> Tensor:
        rows = (last - first, *shape[1:]) if shape else ()
        return read_numbers(path, begin + first * row_bytes, rows, dtype).float()

    return Source(shape, torch.float32, read)


def read_integer(path: Path) -> int:
    """Read a file of one number that torch saved. Raises ValueError if it is damaged, or holds something else."""
    try:
        return int(torch.load(path, weights_only=True))
    except UNREADABLE as error:
        raise ValueError(
            f"{path} holds no number that torch saved ({str(error)[:200]}); copy the folder again"
        ) from error


def read_numbers(path: Path, begin: int, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Read numbers that are one after the other from a byte of a file on."""
    raw = bytearray(math.prod(shape) * dtype.itemsize)
    with named(path), path.open("rb") as file:
        file.seek(begin)
        file.readinto(raw)
    return torch.frombuffer(raw, dtype=dtype).view(shape) if raw else torch.empty(shape, dtype=dtype)


def find_numbers(saved: Path | BinaryIO, where: object) -> tuple[Tensor, int]:
    """A stand-in for the tensor that torch saved, without numbers, and the byte at which they begin.

    Raises ValueError if it is damaged, or saved in another way.
    """
    try:
        with FakeTensorMode():
            found = torch.load(saved, weights_only=True)
    except UNREADABLE as error:
        raise ValueError(
            f"{where} is not a whole file of torch.save ({str(error)[:200]}); copy the folder again"
        ) from error
    tensor = found.get(PARAM) if isinstance(found, dict) else found
    if not isinstance(tensor, Tensor) or not tensor.is_contiguous():
        raise ValueError(f"{where} holds no tensor whose values are in order, on its own or as {PARAM!r}; save it so")
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if offset is None:
        raise ValueError(f"{where} was not written as an archive; save it with torch 1.6 or later")
    return tensor, int(offset) + int(tensor.storage_offset()) * tensor.dtype.itemsize


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
