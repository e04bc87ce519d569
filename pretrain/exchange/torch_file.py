"""One tensor in a file of `torch.save`, written and read some rows at a time.

torch can leave out the bytes of a tensor while it saves the rest of a file (`skip_data`), and tells where they belong when
the file is loaded under a fake mode: so a tensor larger than memory goes out and comes in by blocks, and the file stays
one that `torch.load` reads.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from amfm.data_pipeline.durable.naming import named
from amfm.model.on_demand import BLOCK_NUMEL, Source, cut_rows
from amfm.pretrain.exchange.dcp_folder import READ_TYPES
from amfm.pretrain.tensor_files import tensor_bytes

PARAM = "param"


def write_param(path: Path, source: Source) -> None:
    """Write `{"param": tensor}`; one larger than a block goes out by blocks of rows, without a checksum in the archive."""
    if math.prod(source.shape) <= BLOCK_NUMEL:
        torch.save({PARAM: source.read(0, source.num_rows).clone()}, path)
        return
    with FakeTensorMode():
        empty = torch.empty(source.shape, dtype=source.dtype)
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({PARAM: empty}, path)
    _, start = locate(path)
    with named(path), path.open("r+b") as file:
        file.seek(start)
        for first, last in cut_rows(source.num_rows, source.shape):
            file.write(tensor_bytes(source.read(first, last)))


def read_param(path: Path) -> Source:
    """The tensor of such a file as rows on demand, in float32.

    Raises ValueError where the file is cut or damaged, or holds something else.
    """
    tensor, start = locate(path)
    shape, dtype = tuple(tensor.shape), tensor.dtype
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    if path.stat().st_size < start + tensor.nbytes:
        raise ValueError(f"{path} is cut: it has {path.stat().st_size} bytes, {start + tensor.nbytes} are in use")

    def read(first: int, last: int) -> Tensor:
        raw = bytearray((last - first) * row_bytes if shape else dtype.itemsize)
        with named(path), path.open("rb") as file:
            file.seek(start + first * row_bytes)
            file.readinto(raw)
        return torch.frombuffer(raw, dtype=dtype).view(last - first, *shape[1:]).float()

    return Source(shape, torch.float32, read)


def locate(path: Path) -> tuple[Tensor, int]:
    """A stand-in for the tensor of a file, without numbers, and the byte at which it begins."""
    try:
        with FakeTensorMode():
            found = torch.load(path, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole file of torch.save ({str(error)[:200]}); copy the folder again"
        ) from error
    tensor = found.get(PARAM) if isinstance(found, dict) else found
    if not isinstance(tensor, Tensor) or tensor.dtype not in READ_TYPES or not tensor.is_contiguous():
        raise ValueError(
            f"{path} holds no tensor of floating-point numbers under {PARAM!r}; give a universal checkpoint"
        )
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if offset is None:
        raise ValueError(f"{path} was not written as an archive; save it with torch 1.6 or later")
    return tensor, int(offset) + int(tensor.storage_offset()) * tensor.dtype.itemsize
