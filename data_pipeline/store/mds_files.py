"""Shards of MosaicML Streaming (.mds), read without the library: a shard describes what its samples hold.

Format (mosaicml-streaming 0.13.0, version 2): the number of samples and the byte where each begins, with the end (uint32); a JSON
object with names, encodings and fixed sizes of the columns; then the samples, each the sizes of its columns that have no
fixed one (uint32), and its columns. Little-endian. Of its encodings those of text, JSON and integers are read; `pkl` would run
what a file says, and is rejected.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

MOST_HEADER_BYTES = 2**20
MOST_SAMPLE_BYTES = 2**28
ITEM = 4  # bytes of a number of the header
VALUE_TYPES = {8: "u1", 9: "i1", 16: "<u2", 17: "<i2", 32: "<u4", 33: "<i4", 64: "<u8", 65: "<i8"}
BY_NAME = {np.dtype(kind).name: kind for kind in VALUE_TYPES.values()}
SHAPE_TYPES = ("u1", "<u2", "<u4", "<u8")
READ = ("str", "json", "bytes", "ndarray")


class DamagedShardError(ValueError):
    """A shard, or one of its samples, is not as the library writes it."""


@dataclass(frozen=True)
class MdsShard:
    """Where the samples of a shard are, and what they hold. sizes: bytes of a column, None where each sample says it."""

    offsets: npt.NDArray[np.int64]
    names: tuple[str, ...]
    encodings: tuple[str, ...]
    sizes: tuple[int | None, ...]

    @property
    def num_samples(self) -> int:
        """Samples of the shard."""
        return len(self.offsets) - 1

    def column_problem(self, name: str) -> str | None:
        """Why this column cannot be read; None where it can."""
        if name not in self.names:
            return f"no column {name!r} among {', '.join(self.names)}"
        encoding = self.encodings[self.names.index(name)]
        if encoding.partition(":")[0] in READ:
            return None
        return f"column {name!r} with encoding {encoding!r}, and read are {', '.join(READ)}"

    def read(self, file: IO[bytes], number: int, columns: Sequence[str]) -> list[Any]:
        """The values of columns of a sample: text, JSON, or integers [tokens]. Raises DamagedShardError."""
        start, stop = self.offsets[number : number + 2].tolist()
        if stop - start > MOST_SAMPLE_BYTES:
            raise DamagedShardError(f"sample {number} has {stop - start:,} bytes, more than {MOST_SAMPLE_BYTES:,}")
        file.seek(start)
        content = file.read(stop - start)
        variable = self.sizes.count(None)
        if len(content) < max(stop - start, ITEM * variable):
            raise DamagedShardError(f"sample {number} is truncated")
        given = iter(np.frombuffer(content, "<u4", variable).tolist())
        sizes = [next(given) if size is None else size for size in self.sizes]
        ends = np.cumsum([ITEM * variable, *sizes]).tolist()
        if ends[-1] != len(content):
            raise DamagedShardError(
                f"the columns of sample {number} have {ends[-1]} bytes, and the sample {len(content)}"
            )
        places = [self.names.index(name) for name in columns]
        return [_decode(self.encodings[place], content[ends[place] : ends[place + 1]], number) for place in places]


def read_mds_shard(file: IO[bytes], num_bytes: int) -> MdsShard:
    """Read the head of a shard of so many bytes. Raises DamagedShardError if it is none."""
    head = file.read(ITEM)
    number = int.from_bytes(head, "little")
    header = ITEM * (number + 2)
    if len(head) < ITEM or header > num_bytes:
        raise DamagedShardError(f"{num_bytes} bytes cannot hold its {number} samples")
    offsets = np.frombuffer(file.read(header - ITEM), "<u4").astype(np.int64)
    if len(offsets) != number + 1 or offsets[-1] != num_bytes or (np.diff(offsets, prepend=header) < 0).any():
        raise DamagedShardError("its samples must follow one another, up to its end")
    if offsets[0] - header > MOST_HEADER_BYTES:
        raise DamagedShardError(f"{offsets[0] - header:,} bytes describe its columns, more than {MOST_HEADER_BYTES:,}")
    try:
        described = json.loads(file.read(int(offsets[0]) - header))
        names, encodings, sizes = (described[f"column_{what}"] for what in ("names", "encodings", "sizes"))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedShardError(f"what describes its columns cannot be read: {error}") from error
    if not (
        all(isinstance(each, list) and len(each) == len(names) for each in (names, encodings, sizes))
        and all(isinstance(text, str) for text in (*names, *encodings))
        and all(size is None or (type(size) is int and 0 <= size <= num_bytes) for size in sizes)
    ):
        raise DamagedShardError("names, encodings and sizes of its columns do not fit each other")
    return MdsShard(offsets, tuple(names), tuple(encodings), tuple(sizes))


def _decode(encoding: str, content: bytes, number: int) -> Any:
    kind, _, settings = encoding.partition(":")
    try:
        if kind == "str":
            return content.decode()
        if kind == "json":
            return json.loads(content)
        # Before there were arrays, llm-foundry wrote ids of 8 bytes.
        return np.frombuffer(content, "<i8") if kind == "bytes" else _decode_array(settings, content)
    except UnicodeDecodeError:
        raise  # only of the record
    except (ValueError, IndexError, KeyError, RecursionError) as error:
        raise DamagedShardError(f"sample {number} cannot be read as {encoding}: {error}") from error


def _decode_array(settings: str, content: bytes) -> npt.NDArray[Any]:
    """An array whose type and shape are in the encoding, or else in front of its values."""
    name, _, shape = settings.partition(":")
    place = 0
    if name:
        dtype = np.dtype(BY_NAME[name])
    else:
        dtype, place = np.dtype(VALUE_TYPES[content[0]]), 1
    if shape:
        sizes = [int(text) for text in shape.split(",")]
    else:
        dimensions, size_type = content[place] >> 2, np.dtype(SHAPE_TYPES[content[place] & 3])
        place += 1
        sizes = np.frombuffer(content, size_type, dimensions, place).tolist()
        place += dimensions * size_type.itemsize
    values = np.frombuffer(content, dtype, offset=place) if place < len(content) else np.zeros(0, dtype)
    if len(values) != math.prod(sizes):
        raise ValueError(f"{len(values)} values for the shape {sizes}")
    return values
