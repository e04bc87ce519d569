"""Optimizer states that Megatron-Core saved as its ranks hold them, in the form of one tensor a parameter.

Two forms of its distributed optimizer (megatron-core 0.16.1, distrib_optimizer.py and param_and_grad_buffer.py):

- In buckets (`dp_reshardable`, the default since 0.15): each model-parallel rank has flat tensors
  `optimizer.distributed.dp_group_idx_R.gbuf_idx_B.dtype_D.bucket_idx_N.exp_avg`, in which its parameters
  stand one after the other, each from a multiple of 64 numbers on. Which parameter is where follows from the modules,
  layout and settings of that run, and is not saved.
- Flat (`fully_sharded_model_space`, the default of 0.8 to 0.14): a tensor a parameter, whose first dimensions count the
  chunks that ranks had of it and whose last has the numbers of a chunk.

In both a chunk of a weight, which one rank had, is numbers that are one after the other. So states are read in the chunks
of the weights that were saved with them.

Places in buckets are found by values: buckets have float32 weights next to moments, and what these round to was saved by
name. From its first number to its last a bucket must be chunks of weights and padding, and each chunk must be found.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from amfm_foreign_states.dcp_folder import DcpFolder, ReadPart

BUCKET = re.compile(
    r"((?:chained_\d+\.)?optimizer\.distributed\.dp_group_idx_\d+)\.(gbuf_idx_\d+\.dtype_.+\.bucket_idx_\d+)"
    r"\.(param|exp_avg|exp_avg_sq)"
)
STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(fp32_param|param|exp_avg|exp_avg_sq)\.(.+)")
ALIGNMENT = 64  # numbers; where a parameter begins
COMPARED = 64  # numbers of a chunk, to find it
COMPARED_ALIKE = 1 << 16  # of chunks that begin alike
REMEDY = "save it once with --dist-ckpt-optim-fully-reshardable, or leave the optimizer out (--no-save-optim)"
# What a step changes and no optimizer has states of.
BUFFERS = (".expert_bias", ".local_tokens_per_expert")
Place = tuple[str, int]  # a bucket, and the first number in it
States = dict[str, dict[str, str]]  # by kind and name of the weight, the tensor of a folder


@dataclass(frozen=True)
class Piece:
    """A chunk of a weight: how many numbers it has, the first of them, and how far float32 is from what was saved."""

    name: str
    chunk: ChunkStorageMetadata
    numel: int
    begin: Tensor
    dtype: torch.dtype

    def key(self) -> tuple[str, tuple[int, ...]]:
        """Which chunk it is."""
        return self.name, tuple(self.chunk.offsets)

    def rounds_to(self, masters: Tensor, saved: Tensor) -> bool:
        """Whether float32 weights are the saved ones, but for rounding."""
        limits = torch.finfo(self.dtype)
        count = min(len(masters), len(saved))
        return torch.allclose(
            masters[:count].double(),
            saved[:count].double(),
            rtol=limits.eps / 2,
            atol=limits.smallest_normal * limits.eps,
        )


def states_by_parameter(folder: DcpFolder) -> States:
    """Add tensors of states in these forms to a folder, in the chunks of the weights; returns which.

    Raises ValueError if what buckets have is not what the weights are, or float32 weights are those of other parameters.
    """
    check_masters(folder)
    weights = [key for key in folder.tensors if "optimizer." not in key and not key.endswith(BUFFERS)]
    flat = flat_states(folder)
    return bucket_states(folder, weights) if any(map(BUCKET.fullmatch, folder.tensors)) else flat


def check_masters(folder: DcpFolder) -> None:
    """Raise ValueError for float32 weights by parameters that do not round to the weights next to them.

    megatron-core 0.16.1 saves them, and moments, from other places of its buffer behind a bucket with padding at its end.
    """
    for key, matched in [(key, STATE.fullmatch(key)) for key in folder.tensors]:
        if matched is None or "param" not in matched[1] or matched[2] not in folder.tensors:
            continue
        chunks = folder.tensors[key].chunks
        for piece in pieces_of(folder, matched[2]):
            if piece.chunk in chunks and not piece.rounds_to(
                folder.numbers(key, piece.chunk, 0, len(piece.begin)), piece.begin
            ):
                raise ValueError(
                    f"{folder.path}: the float32 weights of {piece.name} are not those that were saved as weights: megatron-core "
                    "until 0.16 mixes up states that it saves by parameters where buckets have padding; save them in buckets "
                    "(dp_reshardable, without --dist-ckpt-optim-fully-reshardable), or leave the optimizer out (--no-save-optim)"
                )


def flat_states(folder: DcpFolder) -> States:
    """Add states that have the numbers of a chunk in their last dimension."""
    states: States = {}
    for key, matched in [(key, STATE.fullmatch(key)) for key in folder.tensors]:
        weight = folder.tensors.get(matched[2]) if matched else None
        stored = folder.tensors[key]
        if matched is None or weight is None or len(stored.size) != len(weight.size) + 1:
            continue

        def read(chunk: ChunkStorageMetadata, first: int, count: int, key: str = key) -> Tensor:
            lead = tuple(offset // size for offset, size in zip(chunk.offsets, chunk.sizes))
            return folder.rows(key, first, first + count, lead)

        kind, name = matched.groups()
        states.setdefault(kind, {})[name] = f"{kind} of {name}"
        folder.add(f"{kind} of {name}", name, stored.properties.dtype, read)
    return states


def bucket_states(folder: DcpFolder, weights: Sequence[str]) -> States:
    """Add states that are in buckets. Raises ValueError if a chunk of a weight is in no bucket, or could be in several."""
    places = Search(folder, weights).places()
    states: States = {}
    for name in weights:
        bucket, _ = places[name, tuple(folder.tensors[name].chunks[0].offsets)]
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            if f"{bucket}.{kind}" in folder.tensors:
                states.setdefault(kind, {})[name] = f"{kind} of {name}"
                dtype = folder.tensors[f"{bucket}.{kind}"].properties.dtype
                folder.add(f"{kind} of {name}", name, dtype, reader(folder, places, name, kind))
    return states


def reader(folder: DcpFolder, places: Mapping[tuple[str, tuple[int, ...]], Place], name: str, kind: str) -> ReadPart:
    """Read a kind of state of a weight out of its buckets."""

    def read(chunk: ChunkStorageMetadata, first: int, count: int) -> Tensor:
        bucket, begin = places[name, tuple(chunk.offsets)]
        return folder.rows(f"{bucket}.{kind}", begin + first, begin + first + count)

    return read


class Search:
    """Finds chunks of weights in buckets."""

    def __init__(self, folder: DcpFolder, weights: Sequence[str]) -> None:
        self.folder = folder
        self.pieces = [piece for name in weights for piece in pieces_of(folder, name)]
        self.first = torch.tensor([float(piece.begin[0]) for piece in self.pieces], dtype=torch.float64)
        self.found: dict[tuple[str, tuple[int, ...]], Place] = {}

    def places(self) -> dict[tuple[str, tuple[int, ...]], Place]:
        """Find where each chunk begins; of one that several model-parallel ranks have, the first of these places."""
        ends: list[str] = []
        matched = [found for found in map(BUCKET.fullmatch, self.folder.tensors) if found and found[3] == "param"]
        groups: dict[str, set[int]] = {found[1]: set() for found in matched}
        for found in matched:
            refuse_quantized(self.folder, found[0])
            bucket = f"{found[1]}.{found[2]}"
            end, size = self.fill(bucket, groups[found[1]]), self.folder.tensors[found[0]].size[0]
            if end < size:
                ends.append(f"{bucket} from number {end} of {size}")
        missing = [name for name, chunk in map(Piece.key, self.pieces) if (name, chunk) not in self.found]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(
                f"{self.folder.path}: the float32 weights of {missing[0]}{more} are in no bucket of the optimizer"
                f"{f' (not understood: {ends[0]})' if ends else ''}; {REMEDY}"
            )
        return self.found

    def fill(self, bucket: str, used: set[int]) -> int:
        """Find the chunks of a bucket, which are not among the `used` ones of its rank; returns where they end."""
        position, size = 0, self.folder.tensors[f"{bucket}.param"].size[0]
        while position < size:
            aligned = -(-position // ALIGNMENT) * ALIGNMENT
            # The next part of a parameter that was saved in parts is right behind.
            begins = (begin for begin in dict.fromkeys((position, aligned)) if begin < size)
            place = next(((begin, index) for begin in begins for index in self.at(bucket, begin, used)), None)
            if place is None:
                return position
            begin, index = place
            used.add(index)
            self.found.setdefault(self.pieces[index].key(), (bucket, begin))
            position = begin + self.pieces[index].numel
        return size

    def at(self, bucket: str, begin: int, used: set[int]) -> Iterator[int]:
        """Iterate over the chunk that begins at a number of a bucket: none or one. Raises ValueError for several."""
        name = f"{bucket}.param"
        left = self.folder.tensors[name].size[0] - begin
        masters = self.folder.rows(name, begin, begin + min(left, COMPARED))
        near = (self.first - float(masters[0])).abs() <= self.first.abs() * 2**-7 + 2**-126
        alike = [
            index
            for index in near.nonzero().flatten().tolist()
            if index not in used
            and (piece := self.pieces[index]).numel <= left
            and piece.rounds_to(masters, piece.begin)
        ]
        if len(alike) > 1:
            longer = self.folder.rows(name, begin, begin + min(left, COMPARED_ALIKE))
            alike = [
                index
                for index in alike
                if self.pieces[index].rounds_to(longer, read_begin(self.folder, self.pieces[index], COMPARED_ALIKE))
            ]
        if len(alike) > 1:
            raise ValueError(
                f"{self.folder.path}: {self.pieces[alike[0]].name} and {self.pieces[alike[1]].name} have the same values, so "
                f"which states are theirs is not known; import a later checkpoint, {REMEDY}"
            )
        yield from alike


def pieces_of(folder: DcpFolder, name: str) -> Iterator[Piece]:
    """Iterate over the chunks of a weight."""
    dtype = folder.tensors[name].properties.dtype
    for chunk in folder.tensors[name].chunks:
        numel = math.prod(chunk.sizes)
        if numel:
            yield Piece(name, chunk, numel, folder.numbers(name, chunk, 0, min(numel, COMPARED)), dtype)


def read_begin(folder: DcpFolder, piece: Piece, count: int) -> Tensor:
    """Read the first numbers of a chunk."""
    return folder.numbers(piece.name, piece.chunk, 0, min(piece.numel, count))


def refuse_quantized(folder: DcpFolder, key: str) -> None:
    """Raise ValueError for buckets of weights in FP8, which are too far from float32 weights to be told apart."""
    if "torch.uint8" in key or "torch:uint8" in key:
        raise ValueError(f"{folder.path}: {key} has the states of FP8 weights (--fp8-param-gather); {REMEDY}")
