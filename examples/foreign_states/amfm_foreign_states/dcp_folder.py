"""Reads the folder that torch Distributed Checkpoint writes, without a process group and without unpickling at large.

`.metadata` is a pickle, which can run any code, so only the record types that torch puts there are read, and names of
everything else become empty stand-ins; values that are not tensors are read with `weights_only`. Before anything is
used, every file that the metadata names must be there in full length, and the chunks of each tensor must add up to it.

Tensors come some rows at a time. torch's own reader loads a whole chunk, which is a whole matrix where one rank saved it;
here torch says where in its file the numbers of a chunk begin, and only the rows that are asked for are read.
"""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from amfm.data_pipeline.durable.files import named
from amfm.data_pipeline.durable.json_files import inside, parse_object, read_bounded, take, understood
from amfm.model.on_demand import Shape, Source
from amfm_foreign_states.torch_file import READ_TYPES, UNREADABLE, Unread, find_numbers, read_numbers

# Numbers of a chunk that are one after the other: from which on, and how many.
ReadPart = Callable[[ChunkStorageMetadata, int, int], Tensor]
METADATA = ".metadata"
MAX_METADATA_BYTES = 1 << 30  # 10^6 chunks have 155 MB
MAX_COMPARED = 1000  # chunks of one tensor, each with each other
RECORD_TYPES: dict[str, Any] = {
    f"{kind.__module__}.{kind.__qualname__}": kind
    for kind in (
        OrderedDict,
        torch.Size,
        torch.serialization._get_layout,
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata.TensorProperties,
        metadata.TensorStorageMetadata,
        metadata._MEM_FORMAT_ENCODING,
        _StorageInfo,
    )
}
# What Megatron-Core 0.13 to 0.15 makes of the metadata: the same with notes of its own.
RECORD_TYPES["megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata"] = metadata.Metadata


class RecordReader(pickle._Unpickler):
    """Reads the records of Distributed Checkpoint out of a pickle, and calls nothing else.

    The unpickler that is written in Python: that in C makes room for as many objects as a file claims to have, 16 GiB for
    ten bytes. Byte arrays, of which the same is true, are in no record.
    """

    dispatch: ClassVar = {
        code: step for code, step in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def find_class(self, module: str, name: str) -> Any:
        """Find a record type, a dtype or a container; any other name becomes a stand-in."""
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype | torch.layout):
            return found
        return RECORD_TYPES.get(f"{module}.{name}", Unread)


class DcpFolder:
    """A folder of torch Distributed Checkpoint: its tensors by name, and the names of its other values.

    Raises ValueError if it is none, if files are missing or cut, and if chunks do not add up to their tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = read_metadata(path)
        entries = self.metadata.state_dict_metadata
        self.tensors = {name: found for name, found in entries.items() if isinstance(found, TensorStorageMetadata)}
        self.values = {name for name, found in entries.items() if isinstance(found, BytesStorageMetadata)}
        # Where the numbers of chunks begin in their files.
        self.begins: dict[MetadataIndex, int] = {}
        # Of tensors that are saved under other names: how the numbers of their chunks are read.
        self.parts: dict[str, ReadPart] = {}
        with understood(path / METADATA):
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
            if not isinstance(found.properties.dtype, torch.dtype):
                faults.append(f"{name} has the dtype {found.properties.dtype!r:.80}, which is not one")
            faults += _chunk_faults(name, found, self.metadata.storage_data)
        if faults:
            raise ValueError(
                f"{self.path} is not whole: {'; '.join(faults[:8])}{f' and {len(faults) - 8} more' if len(faults) > 8 else ''}; "
                "copy the folder again with the files of all ranks"
            )

    def value(self, name: str) -> Any:
        """Read a value that is not a tensor: numbers, texts and containers of them. Raises ValueError for other
        objects.
        """
        try:
            with self._saved(MetadataIndex(name)) as saved:
                return torch.load(saved, weights_only=True)
        except UNREADABLE as error:
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
        return self.rows(name, 0, self.tensors[name].size[0] if len(self.tensors[name].size) else 1)

    def rows(self, name: str, start: int, stop: int, lead: tuple[int, ...] = ()) -> Tensor:
        """Read rows of a tensor, or of the one at the places `lead` of a stack, in its own dtype."""
        return self._rows(name, self.tensors[name], lead, start, stop)

    def add(self, name: str, like: str, dtype: torch.dtype, read_part: ReadPart) -> None:
        """Add a tensor in the chunks of another one, whose numbers are saved under other names.

        `read_part(chunk, first, count)` reads `count` numbers of a chunk, one after the other, from its `first` on.
        """
        self.tensors[name] = TensorStorageMetadata(
            TensorProperties(dtype=dtype), self.tensors[like].size, self.tensors[like].chunks
        )
        self.parts[name] = read_part

    def _rows(self, name: str, found: TensorStorageMetadata, lead: tuple[int, ...], start: int, stop: int) -> Tensor:
        """Read rows of a tensor, at places of a stack if there are `lead`, from all chunks that have a part in them."""
        axis = len(lead)
        if len(found.size) == axis:
            chunk = next(chunk for chunk in found.chunks if _holds(chunk, lead))
            return self._part(name, chunk, [place - first for place, first in zip(lead, chunk.offsets)], ())
        rows = torch.zeros(stop - start, *found.size[axis + 1 :], dtype=found.properties.dtype)
        for chunk in found.chunks:
            first, last = chunk.offsets[axis], chunk.offsets[axis] + chunk.sizes[axis]
            low, high = max(start, first), min(stop, last)
            if low >= high or not _holds(chunk, lead):
                continue
            corner = [*(place - begun for place, begun in zip(lead, chunk.offsets)), low - first]
            ends = zip(chunk.offsets[axis + 1 :], chunk.sizes[axis + 1 :])
            others = [slice(begun, begun + size) for begun, size in ends]
            shape = (high - low, *chunk.sizes[axis + 1 :])
            rows[(slice(low - start, high - start), *others)] = self._part(name, chunk, corner, shape)
        return rows

    def _part(self, name: str, chunk: ChunkStorageMetadata, corner: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """Read numbers of a chunk that are one after the other, from a corner of its first dimensions on."""
        before = sum(place * math.prod(chunk.sizes[axis + 1 :]) for axis, place in enumerate(corner))
        return self.numbers(name, chunk, before, math.prod(shape)).view(shape)

    def numbers(self, name: str, chunk: ChunkStorageMetadata, first: int, count: int) -> Tensor:
        """Read numbers of a chunk that are one after the other, `count` from its `first` on, in its own dtype."""
        if name in self.parts:
            return self.parts[name](chunk, first, count)
        index, dtype = MetadataIndex(name, chunk.offsets), self.tensors[name].properties.dtype
        if index not in self.begins:
            where = f"{self.path}: {name}"
            with self._saved(index) as saved:
                held, begin = find_numbers(saved, where)
            if held.shape != chunk.sizes or held.dtype != dtype:
                raise ValueError(f"{where} is {list(held.shape)} of {held.dtype} in its file; copy the folder again")
            self.begins[index] = self.metadata.storage_data[index].offset + begin
        return read_numbers(self._file(index), self.begins[index] + first * dtype.itemsize, (count,), dtype)

    def _file(self, index: MetadataIndex) -> Path:
        """The file of an item."""
        return inside(self.path, self.metadata.storage_data[index].relative_path)

    @contextmanager
    def _saved(self, index: MetadataIndex) -> Iterator[Any]:
        """An item as it was saved, a file inside of a file. Raises ValueError if an extension of torch changed its bytes."""
        info, file = self.metadata.storage_data[index], self._file(index)
        if getattr(info, "transform_descriptors", None):
            raise ValueError(
                f"{self.path}: {index.fqn} was saved by the extension {', '.join(info.transform_descriptors)}; save it without"
            )
        with named(file), file.open("rb") as stream:
            yield _create_file_view(stream, info.offset, info.length)


def read_metadata(path: Path) -> Metadata:
    """Read `.metadata`, only of its record types. Raises ValueError if it is missing, damaged or something else."""
    file = path / METADATA
    if not file.is_file():
        raise ValueError(f"{file} is missing; give the folder that torch Distributed Checkpoint wrote")
    try:
        found = RecordReader(BytesIO(read_bounded(file, MAX_METADATA_BYTES))).load()
        if isinstance(found, Metadata) and isinstance(found.state_dict_metadata, dict | OrderedDict):
            cast("Any", found).storage_data = found.storage_data or {}
            return found
        problem: object = f"it holds {type(found).__name__}"
    except UNREADABLE as error:
        problem = error
    raise ValueError(f"{file} is not the metadata of torch Distributed Checkpoint ({problem}); copy the folder again")


def _holds(chunk: ChunkStorageMetadata, lead: tuple[int, ...]) -> bool:
    """Whether a chunk has a part of what is at these places of a stack."""
    return all(first <= place < first + size for place, first, size in zip(lead, chunk.offsets, chunk.sizes))


def _chunk_faults(name: str, found: TensorStorageMetadata, storage: dict[MetadataIndex, Any]) -> list[str]:
    """List what is wrong with the chunks of a tensor: outside of it, not stored, overlapping, or not all of it."""
    missing = [chunk for chunk in found.chunks if MetadataIndex(name, chunk.offsets) not in storage]
    if missing:
        return [f"{name}: no file has its chunk at {list(missing[0].offsets)}"]
    boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in found.chunks]
    if not all(len(offsets) == len(sizes) == len(found.size) for offsets, sizes in boxes):
        return [f"{name}: a chunk has other dimensions than shape {list(found.size)}"]
    sides = [side for offsets, sizes in boxes for side in zip(offsets, sizes, found.size)]
    if any(first < 0 or size < 0 or first + size > whole for first, size, whole in sides):
        return [f"{name}: a chunk ends outside of shape {list(found.size)}"]
    held, whole = sum(math.prod(sizes) for _, sizes in boxes), math.prod(found.size)
    if held != whole or len(dict(boxes)) != len(boxes):
        return [f"{name}: its chunks hold {held} numbers of {whole}"]
    return [] if _are_apart(boxes) else [f"{name}: its chunks overlap, and so do not hold all of it"]


def _are_apart(boxes: list[tuple[Shape, Shape]]) -> bool:
    """Whether boxes (offsets, sizes) do not overlap: cut along straight lines as far as that goes, then compared in pairs.

    Layouts of ranks are grids, whose cuts separate all boxes. False, too, where more than MAX_COMPARED have no cut in common.
    """
    waiting = [[box for box in boxes if math.prod(box[1])]]
    while waiting:
        together = waiting.pop()
        for axis in range(len(together[0][0]) if together else 0):
            if len(pieces := _cut(together, axis)) > 1:
                waiting += pieces
                break
        else:
            if len(together) > MAX_COMPARED or any(_overlap(*pair) for pair in combinations(together, 2)):
                return False
    return True


def _cut(boxes: list[tuple[Shape, Shape]], axis: int) -> list[list[tuple[Shape, Shape]]]:
    """Boxes in groups that a straight line across an axis separates."""
    groups: list[list[tuple[Shape, Shape]]] = []
    reached = 0
    for box in sorted(boxes, key=lambda box: box[0][axis]):
        if not groups or box[0][axis] >= reached:
            groups.append([])
        groups[-1].append(box)
        reached = max(reached, box[0][axis] + box[1][axis])
    return groups


def _overlap(left: tuple[Shape, Shape], right: tuple[Shape, Shape]) -> bool:
    """Whether two boxes have a number in common."""
    return all(a < b + size_b and b < a + size_a for a, size_a, b, size_b in zip(*left, *right))


def read_json(folder: DcpFolder, name: str) -> dict[str, Any]:
    """Read a value that is a text with a JSON object in it. Raises ValueError for anything else."""
    where = folder.path / name
    return parse_object(take({name: folder.value(name)}, name, str, folder.path).encode(), where)
