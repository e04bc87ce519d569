"""Safetensors files: what is cut, damaged or cannot be written gives one message that names the file.

The library raises errors of its own kind, for files of someone else that it cannot read and for a full disk
alike. It maps files, and every page that was touched then counts as memory of the process; so what may be larger than
memory is read by positions (`TensorFile`) and written in parts, in any order (`TensorWriter`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from amfm.data_pipeline.durable.files import named
from amfm.model.on_demand import OnDemand, Shape, Source

# Names of the safetensors format for the dtypes that a model or a random state may hold, and that others write.
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is in a file: its dtype and shape, and the byte at which it begins."""

    dtype: torch.dtype
    shape: Shape
    first_byte: int

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


class TensorFile:
    """A safetensors file of whose tensors ranges are read; memory holds what was asked for, and no more.

    It is open from the first read to `close`, and opens again where it is read after that. Raises the error asked for
    when the file is cut or damaged, or holds a dtype that torch does not have.
    """

    def __init__(self, path: Path, error: Callable[[str], Exception] = ValueError) -> None:
        with open_tensors(path, error):  # the library holds the header to its rules
            pass
        self.path, self.error = path, error
        self.file: FileIO | None = None
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        self.tensors: dict[str, StoredTensor] = {}
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise error(
                    f"{path}: tensor {name} is {entry['dtype']}, which is not read; known are {', '.join(DTYPES)}"
                )
            self.tensors[name] = StoredTensor(
                DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0]
            )

    def close(self) -> None:
        """Close the file until it is read again."""
        if self.file is not None:
            self.file.close()
        self.file = None

    def numbers(self, name: str, start: int, stop: int) -> Tensor:
        """Read numbers `start` to `stop` of a flattened tensor.

        Raises OSError, and the file's error where it is cut.
        """
        stored = self.tensors[name]
        flat = torch.empty(stop - start, dtype=stored.dtype)
        view: Any = flat.view(torch.uint8).numpy()
        left, place = memoryview(view), stored.first_byte + start * stored.dtype.itemsize
        with named(self.path):
            self.file = self.file or FileIO(self.path)
            while left:
                count = os.preadv(self.file.fileno(), [left], place)
                if count == 0:
                    raise self.error(f"{self.path}: was cut while it was read; copy or write it again")
                left, place = left[count:], place + count
        return flat

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows of the first dimension of a tensor; one without dimensions is read as it is."""
        shape = self.tensors[name].shape
        if not shape:
            return self.numbers(name, 0, 1).view(())
        row_numel = math.prod(shape[1:])
        return self.numbers(name, start * row_numel, stop * row_numel).view(stop - start, *shape[1:])

    def on_demand(self) -> OnDemand:
        """All tensors of the file, each read when it is asked for."""
        return OnDemand({name: self._source(name) for name in self.tensors})

    def _source(self, name: str) -> Source:
        stored = self.tensors[name]
        return Source(stored.shape, stored.dtype, lambda start, stop: self.rows(name, start, stop))


class TensorWriter:
    """A new safetensors file whose tensors come in parts and in any order.

    Raises FileExistsError if the file is there. `finish` after the last part.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, Shape]]) -> None:
        self.path = path
        self.header, self.places = encode_header(tensors, {"format": "pt"})
        self.tensors = dict(tensors)
        self.missing = sum(dtype.itemsize * math.prod(shape) for dtype, shape in tensors.values())
        with named(path), path.open("xb") as file:
            file.write(self.header)
            file.truncate(len(self.header) + self.missing)

    def put(self, name: str, first_row: int, rows: Tensor) -> None:
        """Write rows of a tensor from `first_row` on, in the dtype that was announced for it."""
        dtype, shape = self.tensors[name]
        assert tuple(rows.shape[1:]) == shape[1:], f"{name}: {tuple(rows.shape)} are not rows of {shape}"
        data = tensor_bytes(rows.to(dtype))
        place = len(self.header) + self.places[name] + first_row * math.prod(shape[1:]) * dtype.itemsize
        # Opened again: an export has hundreds of files, and a process may open a thousand.
        with named(self.path), self.path.open("r+b", buffering=0) as file:
            while data:
                count = os.pwrite(file.fileno(), data, place)
                data, place = data[count:], place + count
                self.missing -= count

    def finish(self) -> None:
        """Assert that all tensors came whole."""
        assert self.missing == 0, f"{self.path}: {self.missing} bytes did not come, or came twice"


def encode_header(
    tensors: Mapping[str, tuple[torch.dtype, Shape]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Encode the head of a safetensors file.

    Length, then JSON with dtype, shape and byte range of each tensor in order.

    Returns it with the byte after it at which each tensor begins.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    places: dict[str, int] = {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        places[name] = offset
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # Padded, so that the tensors begin at a multiple of 8 bytes, aligned in a mapped file.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def tensor_bytes(tensor: Tensor) -> memoryview:
    """View the bytes of a tensor, without a copy when it is contiguous and on the CPU.

    By way of uint8, because numpy has no bfloat16.
    """
    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


@contextmanager
def open_tensors(path: Path, error: Callable[[str], Exception] = ValueError) -> Iterator[Any]:
    """Open a safetensors file for reading; raises the error asked for when it is cut or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as problem:
        raise error(f"{path}: is not a whole safetensors file ({problem})") from problem


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write contiguous tensors that share no memory to one file.

    Held twice meanwhile. Raises OSError with the path. (What safetensors writes itself no one else may read, whatever the
    umask says.)
    """
    with named(path):
        path.write_bytes(save(dict(tensors), metadata={"format": "pt"}))
