"""Reads the folder that torch Distributed Checkpoint writes, without a process group and without unpickling at large.

torch's own reader finds and reads the chunks of a tensor. What is ours: `.metadata` is a pickle, which can run any code, so
only the record types that torch puts there are read, and names of everything else become empty stand-ins; values that are
no tensors are read with `weights_only`. Before anything is used, every file that the metadata names must be there in full
length, and the chunks of each tensor must add up to it.

Tensors come some rows at a time. Memory holds the chunks of the last reads, up to CACHE_BYTES, and at least one chunk.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from amfm.data_pipeline.durable.foreign_files import inside, parse_object, take
from amfm.model.on_demand import Source

METADATA = ".metadata"
CACHE_BYTES = 1 << 29
RECORD_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
READ_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Unread:
    """Stands in for an object of a type that is not read; takes any state and keeps none."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Keep nothing."""

    def __setstate__(self, _: Any) -> None:
        """Keep nothing."""

    def __call__(self, *_: Any, **__: Any) -> Unread:
        """Stand in for what it would make, too."""
        return self


class RecordReader(pickle.Unpickler):
    """Reads the records of Distributed Checkpoint out of a pickle, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Find a record type, a dtype or a container; any other name becomes a stand-in."""
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype | torch.layout) or found is torch.Size:
            return found
        if (module, name) in (("torch.serialization", "_get_layout"), ("collections", "OrderedDict")):
            return super().find_class(module, name)
        if module in RECORD_MODULES and "." not in name:
            kind = super().find_class(module, name)
            if isinstance(kind, type) and kind.__module__ == module:
                return kind
        return Unread


class OneTarget(LoadPlanner):
    """The planner of a single read: where the tensor, or the bytes, go."""

    def __init__(self, target: Tensor | None = None) -> None:
        self.target, self.read = target, b""

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        """Nothing is planned."""

    def create_local_plan(self) -> LoadPlan:
        """No plan beside the one that is given to the reader."""
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """As it is."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take bytes."""
        self.read = value.getvalue()

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Name the tensor to copy into."""
        assert self.target is not None, "a tensor is read into one"
        return self.target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing is left to do."""


class DcpFolder:
    """A folder of torch Distributed Checkpoint: its tensors by name, and the names of its other values.

    Raises ValueError where it is none, where files are missing or cut, and where chunks do not add up to their tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = read_metadata(path)
        entries = self.metadata.state_dict_metadata
        self.tensors = {name: found for name, found in entries.items() if isinstance(found, TensorStorageMetadata)}
        self.values = {name for name, found in entries.items() if isinstance(found, BytesStorageMetadata)}
        self.reader = FileSystemReader(path)
        self.reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        self.kept: OrderedDict[MetadataIndex, Tensor] = OrderedDict()
        self.check()

    def check(self) -> None:
        """Hold files and chunks to the metadata."""
        faults: list[str] = []
        needed: dict[str, int] = {}
        for index, info in self.metadata.storage_data.items():
            if index.fqn in self.tensors or index.fqn in self.values:
                end = info.offset + info.length
                needed[info.relative_path] = max(needed.get(info.relative_path, 0), end)
        for name, end in sorted(needed.items()):
            file = inside(self.path, name)
            if not file.is_file():
                faults.append(f"{name} is missing")
            elif file.stat().st_size < end:
                faults.append(f"{name} has {file.stat().st_size} bytes, {end} are in use")
        for name, found in self.tensors.items():
            faults += _chunk_faults(name, found, self.metadata.storage_data)
        if faults:
            raise ValueError(
                f"{self.path} is not whole: {'; '.join(faults[:8])}{f' and {len(faults) - 8} more' if len(faults) > 8 else ''}; "
                "copy the folder again with the files of all ranks"
            )

    def value(self, name: str) -> Any:
        """Read a value that is no tensor: numbers, texts and containers of them. Raises ValueError for other objects."""
        planner = OneTarget()
        self._read(MetadataIndex(name), LoadItemType.BYTE_IO, torch.Size([]), planner)
        try:
            return torch.load(io.BytesIO(planner.read), weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{self.path}: {name} holds an object that is not read: {error}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self.tensors[name].size)

    def source(self, name: str, lead: tuple[int, ...] = ()) -> Source:
        """A tensor in float32 whose rows are read when they are asked for, or the one at the places `lead` of a stack.

        Raises ValueError for a dtype without one rule.
        """
        found = self.tensors[name]
        if found.properties.dtype not in READ_TYPES:
            raise ValueError(
                f"{self.path}: {name} is {str(found.properties.dtype).removeprefix('torch.')}; numbers are read in "
                "float32, bfloat16, float16 or float64"
            )
        shape = tuple(found.size)[len(lead) :]
        return Source(shape, torch.float32, lambda start, stop: self._rows(name, found, lead, start, stop).float())

    def tensor(self, name: str) -> Tensor:
        """Read a whole small tensor in its own dtype."""
        found = self.tensors[name]
        return self._rows(name, found, (), 0, found.size[0] if len(found.size) else 1)

    def _rows(self, name: str, found: TensorStorageMetadata, lead: tuple[int, ...], start: int, stop: int) -> Tensor:
        """Read rows of a tensor, at places of a stack where there are `lead`, from all chunks that have a part in them."""
        axis, dtype = len(lead), found.properties.dtype
        if len(found.size) == axis:
            chunk = next(chunk for chunk in found.chunks if _holds(chunk, lead))
            return self._chunk(name, chunk, dtype)[tuple(place - first for place, first in zip(lead, chunk.offsets))]
        rows = torch.zeros(stop - start, *found.size[axis + 1 :], dtype=dtype)
        for chunk in found.chunks:
            first, last = chunk.offsets[axis], chunk.offsets[axis] + chunk.sizes[axis]
            low, high = max(start, first), min(stop, last)
            if low >= high or not _holds(chunk, lead):
                continue
            values = self._chunk(name, chunk, dtype)[tuple(place - begun for place, begun in zip(lead, chunk.offsets))]
            ends = zip(chunk.offsets[axis + 1 :], chunk.sizes[axis + 1 :])
            others = [slice(begun, begun + size) for begun, size in ends]
            rows[(slice(low - start, high - start), *others)] = values[low - first : high - first]
        return rows

    def _chunk(self, name: str, chunk: ChunkStorageMetadata, dtype: torch.dtype) -> Tensor:
        """Read one chunk, or take it from those that were read last."""
        index = MetadataIndex(name, chunk.offsets)
        if index in self.kept:
            self.kept.move_to_end(index)
            return self.kept[index]
        room = CACHE_BYTES - math.prod(chunk.sizes) * dtype.itemsize
        while self.kept and sum(kept.nbytes for kept in self.kept.values()) > max(0, room):
            self.kept.popitem(last=False)
        target = torch.empty(chunk.sizes, dtype=dtype)
        self._read(index, LoadItemType.TENSOR, chunk.sizes, OneTarget(target))
        self.kept[index] = target
        return target

    def _read(self, index: MetadataIndex, kind: LoadItemType, sizes: torch.Size, planner: OneTarget) -> None:
        """Let torch's reader read one item. Raises ValueError for what it cannot read."""
        origin = torch.Size([0] * len(sizes))
        item = ReadItem(kind, index, origin, index, origin, sizes)
        try:
            self.reader.read_data(LoadPlan([item]), planner)
        except (RuntimeError, AssertionError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{self.path}: {index.fqn} is damaged ({str(error)[:200]}); copy the folder again"
            ) from error


def read_metadata(path: Path) -> Metadata:
    """Read `.metadata`, of its record types alone. Raises ValueError where it is missing, damaged or something else."""
    file = path / METADATA
    if not file.is_file():
        raise ValueError(f"{file} is missing; give the folder that torch Distributed Checkpoint wrote")
    try:
        with file.open("rb") as stream:
            found = RecordReader(stream).load()
        if isinstance(found, Metadata) and isinstance(found.state_dict_metadata, dict | OrderedDict):
            cast("Any", found).storage_data = found.storage_data or {}
            return found
        problem: object = f"it holds {type(found).__name__}"
    except (pickle.UnpicklingError, EOFError, TypeError, ValueError, AttributeError, IndexError) as error:
        problem = error
    raise ValueError(f"{file} is not the metadata of torch Distributed Checkpoint ({problem}); copy the folder again")


def _holds(chunk: ChunkStorageMetadata, lead: tuple[int, ...]) -> bool:
    """Whether a chunk has a part of what lies at these places of a stack."""
    return all(first <= place < first + size for place, first, size in zip(lead, chunk.offsets, chunk.sizes))


def _chunk_faults(name: str, found: TensorStorageMetadata, storage: dict[MetadataIndex, Any]) -> list[str]:
    """List what is wrong with the chunks of a tensor: outside of it, not stored, overlapping, or not all of it."""
    missing = [chunk for chunk in found.chunks if MetadataIndex(name, chunk.offsets) not in storage]
    if missing:
        return [f"{name}: no file has its chunk at {list(missing[0].offsets)}"]
    ends = [[first + size for first, size in zip(chunk.offsets, chunk.sizes)] for chunk in found.chunks]
    if any(end > whole for chunk_ends in ends for end, whole in zip(chunk_ends, found.size)):
        return [f"{name}: a chunk ends outside of shape {list(found.size)}"]
    held, whole = sum(math.prod(chunk.sizes) for chunk in found.chunks), math.prod(found.size)
    corners = {tuple(chunk.offsets) for chunk in found.chunks}
    if held != whole or len(corners) != len(found.chunks):
        return [f"{name}: its chunks hold {held} numbers of {whole}"]
    return []


def read_json(folder: DcpFolder, name: str) -> dict[str, Any]:
    """Read a value that is a text with a JSON object in it. Raises ValueError for anything else."""
    where = folder.path / name
    return parse_object(take({name: folder.value(name)}, name, str, folder.path).encode(), where)
