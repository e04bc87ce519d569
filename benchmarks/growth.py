"""How reading a source grows with its size: `python -m benchmarks.growth` doubles each kind of file, made hard for it.

What is read is planned and read as one actor of `amfm prepare` does, segment after segment, without tokenizing; each size in
a process of its own, whose peak of memory is its own. Linear growth shows as MB per second that stay, bounded memory as a
peak that stays.
"""

from __future__ import annotations

import gzip
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import typer

from amfm.data_pipeline.config import SourceConfig
from amfm.data_pipeline.prepare.documents import SegmentReader
from amfm.data_pipeline.prepare.records import Reject
from amfm.data_pipeline.prepare.segments import cut_segments
from amfm.data_pipeline.prepare.sources import list_files
from amfm.data_pipeline.store.megatron_files import HEADER, MAGIC
from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_rows, say
from benchmarks.command import main

SEGMENT_BYTES = 2_000_000  # of a part of the default size
MB = 10**6
TEXT = "Some text of a document, as long as a sentence that was written to be read. "


def _records(num_bytes: int) -> Iterator[bytes]:
    line = (json.dumps({"text": TEXT * 13}) + "\n").encode()
    for _ in range(num_bytes // len(line)):
        yield line


def _write_lines(path: Path, lines: Iterator[bytes]) -> None:
    with path.open("wb") as file:
        file.writelines(lines)


def _write_gzip(path: Path, num_bytes: int) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.writelines(_records(num_bytes))


def _with_rejects(num_bytes: int) -> Iterator[bytes]:
    for number, line in enumerate(_records(num_bytes)):
        yield b"no JSON\n" if number % 1000 == 0 else line


def _write_parquet(path: Path, num_bytes: int) -> None:
    """Row groups of 16 documents and eleven columns, as a writer of a stream leaves them."""
    columns = {f"column{number}": ["value"] * 16 for number in range(10)} | {"text": [TEXT * 3] * 16}
    table = pyarrow.table(columns)
    with pyarrow.parquet.ParquetWriter(path, table.schema, compression="none", use_dictionary=False) as writer:
        for _ in range(num_bytes // (len(TEXT) * 48)):
            writer.write_table(table)


def _write_arrow(path: Path, num_bytes: int) -> None:
    table = pyarrow.table({"text": [TEXT * 13] * 1000})
    with pyarrow.ipc.new_stream(path, table.schema) as stream:
        for _ in range(num_bytes // (len(TEXT) * 13_000)):
            stream.write_table(table)


def _write_tokens(path: Path, num_bytes: int) -> None:
    lengths = np.full(num_bytes // 400, 200, "<i4")
    pointers, bounds = np.arange(len(lengths), dtype="<i8") * 400, np.arange(len(lengths) + 1, dtype="<i8")
    head = HEADER.pack(MAGIC, 1, 8, len(lengths), len(bounds))
    path.write_bytes(head + lengths.tobytes() + pointers.tobytes() + bounds.tobytes())
    (np.arange(len(lengths) * 200) % 1000).astype("<u2").tofile(path.with_suffix(".bin"))


def _write_small_files(folder: Path, num_bytes: int) -> None:
    folder.mkdir()
    for number in range(num_bytes // 2000):
        (folder / f"{number}.txt").write_text(TEXT * 26)


# By name: the path below the folder, and what writes about so many bytes there.
KINDS: dict[str, tuple[str, Callable[[Path, int], None]]] = {
    "jsonl": ("a.jsonl", lambda path, size: _write_lines(path, _records(size))),
    "jsonl, a reject per MB": ("a.jsonl", lambda path, size: _write_lines(path, _with_rejects(size))),
    "jsonl, rejects alone": (
        "a.jsonl",
        lambda path, size: _write_lines(path, (b"name;of;a;column;of;a;table\n" for _ in range(size // 28))),
    ),
    "jsonl, one line": ("a.jsonl", lambda path, size: _write_lines(path, iter((b"[" + b"1, " * (size // 3),)))),
    "jsonl.gz": ("a.jsonl.gz", _write_gzip),
    "parquet, small row groups": ("a.parquet", _write_parquet),
    "arrow": ("a.arrow", _write_arrow),
    "idx and bin": ("a.idx", _write_tokens),
    "small text files": ("texts", _write_small_files),
}


def _peak_bytes() -> int:
    """The most memory that this process had; what rusage reports is its parent's before that."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def _read(path: Path, sender: Any) -> None:
    """Plan and read all of a path, and send what it took."""
    resident = _peak_bytes()
    began, documents, rejects = time.process_time(), 0, 0
    for file in list_files(SourceConfig(name="all", paths=(str(path),))):
        for segment in cut_segments(file, SEGMENT_BYTES):
            for item in SegmentReader(segment, "text"):
                documents += not isinstance(item, Reject)
                rejects += isinstance(item, Reject)
    seconds, peak = time.process_time() - began, _peak_bytes() - resident
    sender.send({"documents": documents, "rejects": rejects, "cpu_seconds": seconds, "peak_bytes": peak})


def measure(kind: str, megabytes: int, work: Path) -> dict[str, Any]:
    """Write about so much text as a file of this kind and read it: CPU seconds and what memory grew by at most, bytes."""
    name, write = KINDS[kind]
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write(work / name, megabytes * MB)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_read, args=(work / name, sender))
    process.start()
    sender.close()
    try:
        found: dict[str, Any] = receiver.recv()
    except EOFError as error:
        raise RuntimeError(f"the process that read {megabytes} MB of {kind} died") from error
    finally:
        process.join()
        shutil.rmtree(work)
    return {"kind": kind, "megabytes": megabytes, **found, "megabytes_per_second": megabytes / found["cpu_seconds"]}


def growth(
    *,
    megabytes: Annotated[int, typer.Option(min=1, help="Size of the smallest file of each kind.")] = 50,
    doublings: Annotated[int, typer.Option(min=1, help="How often it is doubled.")] = 3,
    kinds: Annotated[list[str] | None, typer.Option(help=f"Of {'; '.join(KINDS)}. Default: all.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for the files; deleted at the end.")] = Path("data/growth"),
    as_json: JsonOption = False,
) -> None:
    """Read each kind of file at sizes that double: what a megabyte costs, and memory."""
    rows = []
    for kind in kinds or KINDS:
        for doubling in range(doublings + 1):
            say(f"{kind}: {megabytes << doubling} MB")
            rows.append(measure(kind, megabytes << doubling, work))
    if as_json:
        print_json({"rows": rows})
        return
    columns = ("kind", "MB", "documents", "rejects", "CPU s", "MB per CPU s", "memory, MiB")
    shown = [
        (
            row["kind"],
            f"{row['megabytes']:,}",
            f"{row['documents']:,}",
            f"{row['rejects']:,}",
            f"{row['cpu_seconds']:.1f}",
            f"{row['megabytes_per_second']:.0f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
        )
        for row in rows
    ]
    print_rows("Reading a source that doubles", columns, shown)


if __name__ == "__main__":
    main(growth)
