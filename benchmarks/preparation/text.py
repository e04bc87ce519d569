"""Text of a given size for `python -m benchmarks.preparation`: real files, and lines of them drawn again by a seed.

The real text is the installed Python sources, as `amfm sample-data python-sources` collects it. A generated document is a run of
lines drawn from it, so that a tokenizer finds in it what it finds in text, at a speed at which 10 GB are made in minutes.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet

from amfm.data_pipeline.config import SourceConfig
from amfm.data_pipeline.durable.files import write_file_atomically
from amfm.data_pipeline.prepare.sample_text import collect_python_sources

REAL_MEGABYTES = 120  # at most: what every installation has
REAL_SHARE = 4  # at most one byte in so many is real
POOL_BYTES = 30_000_000  # of lines that generated documents are drawn from
LINES_PER_DOCUMENT = 80  # on average, about 3 kB
SMALL_FILE_LINES = 12
ROW_GROUP = 1000


@dataclass(frozen=True)
class TextSize:
    """How much text in which pieces. megabytes: 10^6 bytes of text in jsonl and parquet, real and generated.

    shards: files of generated text, over all sources, jsonl and parquet in turns. sources: of generated text; the real text
    and the small files are one more each. files: text files of half a kilobyte, a document each.
    """

    megabytes: int
    shards: int
    sources: int
    files: int


def make_text(folder: Path, size: TextSize, report: Callable[[str], None]) -> tuple[SourceConfig, ...]:
    """Write the text once, and return the sources of a configuration that reads it. A second call finds it there."""
    real = min(REAL_MEGABYTES, max(1, size.megabytes // REAL_SHARE))
    collect_python_sources(folder / "real", real)
    made = folder / "made.json"
    if not made.is_file() or json.loads(made.read_bytes()) != asdict(size):
        for old in ("generated", "files"):
            shutil.rmtree(folder / old, ignore_errors=True)
        report(f"writing {size.megabytes} MB of text in {size.shards} shards and {size.files} small files")
        lines = _lines(folder / "real")
        _write_shards(folder / "generated", lines, size, (size.megabytes - real) * 10**6)
        _write_small_files(folder / "files", lines, size.files)
        write_file_atomically(made, json.dumps(asdict(size)).encode())
    names = [f"generated-{number:04d}" for number in range(size.sources)]
    sources = {"real": folder / "real", **{name: folder / "generated" / name for name in names}}
    if size.files:
        sources["files"] = folder / "files"
    return tuple(SourceConfig(name=name, paths=(str(path),)) for name, path in sources.items())


def _lines(folder: Path) -> npt.NDArray[np.object_]:
    """Lines of the real text, newlines included, up to POOL_BYTES."""
    found: list[str] = []
    num_bytes = 0
    for path in sorted(folder.glob("*.jsonl")):
        for record in path.read_bytes().splitlines():
            found += json.loads(record)["text"].splitlines(keepends=True)
            num_bytes += len(record)
            if num_bytes >= POOL_BYTES:
                break
    return np.array(found, dtype=object)


def _documents(lines: npt.NDArray[np.object_], num_bytes: int, seed: int) -> Iterator[str]:
    """Draw documents of together about so many bytes; their lengths are as uneven as an exponential distribution's."""
    random = np.random.default_rng(seed)
    total = 0
    while total < num_bytes:
        length = 1 + int(random.exponential(LINES_PER_DOCUMENT))
        text = "".join(lines[random.integers(len(lines), size=length)])
        total += len(text)
        if not text.isspace():
            yield text


def _write_shards(folder: Path, lines: npt.NDArray[np.object_], size: TextSize, num_bytes: int) -> None:
    for number in range(size.shards):
        source = folder / f"generated-{number % size.sources:04d}"
        source.mkdir(parents=True, exist_ok=True)
        texts = _documents(lines, math.ceil(num_bytes / size.shards), number)
        if number // size.sources % 2:
            table = pyarrow.table({"text": list(texts)})
            pyarrow.parquet.write_table(
                table, source / f"{number:06d}.parquet", compression="zstd", row_group_size=ROW_GROUP
            )
        else:
            with (source / f"{number:06d}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def _write_small_files(folder: Path, lines: npt.NDArray[np.object_], number: int) -> None:
    random = np.random.default_rng(number)
    for index in range(number):
        place = folder / f"{index // 1000:04d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index:06d}.txt").write_text(
            "".join(lines[random.integers(len(lines), size=SMALL_FILE_LINES)]) or "-", encoding="utf-8"
        )
