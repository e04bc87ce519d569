"""Small files that claim or unpack to gigabytes, and large ones where a small one is expected."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow

from tests.faults.inputs.texts import lines_of, prepare
from tests.faults.inputs.trial import Case

UNPACKED = 3 << 30  # above what a document, a table and the memory of a case may have


def write_gz(path: Path, head: bytes, unit: bytes) -> None:
    """A stream of UNPACKED bytes: what one mebibyte of them packs to, again and again."""
    block = unit * ((1 << 20) // len(unit))
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    packed = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    with path.open("wb") as file:
        file.write(gzip.compress(b"")[:10] + first)
        for _ in range(UNPACKED >> 20):
            file.write(packed)
        file.write(zlib.compressobj(9, zlib.DEFLATED, -15).flush() + bytes(8))  # the sum at its end is wrong


def write_zst(path: Path, head: bytes, unit: bytes) -> None:
    """Frames that unpack to UNPACKED bytes."""
    codec = pyarrow.Codec("zstd")
    frame = codec.compress(unit * ((1 << 20) // len(unit)), asbytes=True)
    with path.open("wb") as file:
        file.write(codec.compress(head, asbytes=True) if head else b"")
        for _ in range(UNPACKED >> 20):
            file.write(frame)


def gguf(tensors: int, values: int, more: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + more


GGUFS = {
    "tensors": gguf(2**63, 0),
    "values": gguf(0, 2**63),
    "a key": gguf(0, 1, struct.pack("<Q", 2**62)),
    "an array": gguf(0, 1, struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 8, 2**61)),
    "dimensions": gguf(1, 0, struct.pack("<Q", 1) + b"a" + struct.pack("<I", 2**31)),
}


def bombs(place: Path) -> Iterator[Case]:
    good = lines_of(60)
    packed: dict[str, tuple[Callable[[Path, bytes, bytes], None], bytes, bytes]] = {
        "line.jsonl.gz": (write_gz, good + b'{"text": "', b"a"),
        "line.jsonl.zst": (write_zst, good + b'{"text": "', b"a"),
        "text.txt.gz": (write_gz, b"", b"a"),
        "text.txt.zst": (write_zst, b"", b"a"),
        "table.parquet.gz": (write_gz, b"PAR1", b"\0"),
        "table.arrow.zst": (write_zst, b"\xff\xff\xff\xff", b"\0"),
    }
    for name, (write, head, unit) in packed.items():

        def make(here: Path, name: str = name, parts: Any = (write, head, unit)) -> None:
            (here / "text").mkdir()
            (here / "text" / "good.jsonl").write_bytes(good)
            parts[0](here / "text" / name, *parts[1:])

        yield Case(f"bomb {name}", prepare(str(place / "case")), make)
    for name, content in GGUFS.items():

        def make_gguf(here: Path, content: bytes = content) -> None:
            (here / "model.gguf").write_bytes(content)

        for words in (
            ("import", "HERE/model.gguf", "HERE/out"),
            ("inspect", "HERE/model.gguf"),
            ("serve", "HERE/model.gguf"),
            ("generate", "HERE/model.gguf"),
            ("export", "HERE/model.gguf", "HERE/out"),
        ):
            yield Case(f"GGUF that claims {name}, {words[0]}", words, make_gguf, out="out")
    yield from large(place)


def large(place: Path) -> Iterator[Case]:
    """Files of 100 MB, and of 1 TB without content, where words, settings or descriptions are read."""

    def yaml(here: Path) -> None:
        (here / "run.yaml").write_text("- 1\n" * 25_000_000)

    yield Case("YAML of 100 MB", ("config", "HERE/run.yaml"), yaml)
    yield Case("YAML of 100 MB, train", ("train", "HERE/run.yaml"), yaml)
    sparse = {
        "run.yaml": ("config", "HERE/in/run.yaml"),
        "config.json": ("import", "HERE/in", "HERE/out"),
        "tokenizer_config.json": ("import", "HERE/in", "HERE/out"),
        "model.safetensors.index.json": ("import", "HERE/in", "HERE/out"),
        "manifest.json": ("inspect", "HERE/in"),
        "latest_universal": ("import", "HERE/in", "HERE/out"),
        ".metadata": ("import", "HERE/in", "HERE/out"),
        "weights.json": ("evaluate", "HERE/in"),
        "tokenizer.json": ("import", "HERE/in", "HERE/out"),
    }
    for name, words in sparse.items():

        def make(here: Path, name: str = name) -> None:
            shutil.copytree(place / "exported", here / "in")
            if name == "model.safetensors.index.json":
                (here / "in" / "model.safetensors").unlink()
            (here / "in" / name).touch()
            os.truncate(here / "in" / name, 1 << 40)

        yield Case(f"{name} of 1 TB", words, make, out="out")
    many = json.dumps({"weight_map": {f"a{number}": "model.safetensors" for number in range(300_000)}})

    def index(here: Path) -> None:
        shutil.copytree(place / "exported", here / "in")
        (here / "in" / "model.safetensors.index.json").write_text(many)

    yield Case("an index of 300,000 tensors", ("import", "HERE/in", "HERE/out"), index, out="out")
