"""What a store of a teacher's probabilities holds, and whether its bytes are those that were written.

The manifest says of what the probabilities are, the files how many samples there are. Whether these are all that a run
reads depends on the run: `TeacherStore` and `amfm distill store` find that out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amfm.data_pipeline.durable.foreign_files import read_object, take, understood
from amfm.data_pipeline.terminal import Report, silent
from amfm.pretrain.checkpoint.names import CHECKPOINT_NAME, step_of
from amfm.pretrain.distillation.store import MANIFEST, VERSION, File, StoreLayout, is_sound, when_changed

SAMPLES = re.compile(r"samples-(\d{12})\.bin")
FACTS = ("tokenizer", "vocab_size", "top_k", "temperature", "seed", "packing")


def inspect_teacher_store(
    folder: Path, *, quick: bool = False, report: Report = silent
) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """Problems, facts, and what else two stores may differ in: phases and digests of sources.

    Reads every sample and compares it with its CRC-32C; `quick`: only the sizes of files. Raises ValueError for a manifest
    of another version, or one that was edited or damaged.
    """
    manifest = folder / MANIFEST
    written = read_object(manifest)
    if (version := take(written, "version", int, manifest)) != VERSION:
        raise ValueError(
            f"{folder} is a teacher's store of version {version}, this release reads {VERSION}; use the release that wrote it"
        )
    top_k, vocab_size = (take(written, name, int, manifest) for name in ("top_k", "vocab_size"))
    with understood(manifest):
        lengths = when_changed((int(phase[0]), int(phase[2])) for phase in written["phases"])
        layout = StoreLayout(0, lengths, top_k, StoreLayout.id_bytes_of(vocab_size))
        facts = {name: written[name] for name in FACTS}
        details = {name: written[name] for name in ("phases", "sources", "shuffle", "split")}
    teacher = take(written, "teacher_folder", str, manifest)
    step = step_of(Path(teacher)) if CHECKPOINT_NAME.fullmatch(Path(teacher).name) else None
    files, problems = list_files(folder, layout)
    if not quick:
        problems += find_damage(folder, files, report)
    facts = {
        "verified": "sizes of files" if quick else "every sample",
        "teacher": teacher,
        **({} if step is None else {"step": step}),
        "teacher_digest": take(written, "teacher", str, manifest),
        **facts,
        "files": len(files),
        "samples": sum(file.count for file in files),
        "tokens": sum(file.count * file.length for file in files),
        "bytes": sum(file.count * file.record for file in files),
    }
    return problems, facts, details


def list_files(folder: Path, layout: StoreLayout) -> tuple[list[File], list[str]]:
    """Files of samples in order, with as many as are whole, and problems: truncated files, and samples in none."""
    files: list[File] = []
    problems = []
    end = 0
    for path in sorted(folder.iterdir()):
        if (found := SAMPLES.fullmatch(path.name)) is None:
            continue
        first = int(found[1])
        length = next(length for start, length in reversed(layout.lengths) if start <= first)
        record = layout.record_bytes(length)
        count, rest = divmod(path.stat().st_size, record)
        if first != end:
            problems.append(f"{folder}: samples {end:,} to {first - 1:,} are in no file before {path.name}")
        if rest:
            problems.append(f"{path} is truncated or damaged: {rest} bytes follow its {count:,} samples of {record:,}")
        files.append(File(first, count, length, record))
        end = first + count
    return files, problems if files else [f"{folder} holds no samples; `amfm distill store` writes them"]


def find_damage(folder: Path, files: list[File], report: Report) -> Iterator[str]:
    """Problems of files whose samples fail their checksums, one per file."""
    done, total = 0, sum(file.count * file.record for file in files)
    for file in files:
        damaged = []
        with (folder / file.name).open("rb") as content:
            for sample in range(file.first, file.first + file.count):
                report(f"verifying {folder}", done, total)
                done += file.record
                if not is_sound(content.read(file.record)):
                    damaged.append(sample)
        if damaged:
            yield (
                f"{folder / file.name}: {len(damaged):,} of {file.count:,} samples fail their CRC-32C, first {damaged[0]:,}; "
                "delete the file, and `amfm distill store CONFIG` writes it from the start"
            )
