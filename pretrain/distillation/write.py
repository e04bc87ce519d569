"""Write a store of a teacher's probabilities: every file whole or not at all, so that what is there is not computed a second time.

What a store holds, and whether its bytes are those that were written: the manifest says of what the probabilities are, the files
how many samples there are. Whether these are all that a run reads depends on the run: `TeacherStore` and `amfm distill store`
find that out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amfm.data_pipeline.durable.files import replacing, take_lock, write_file_atomically
from amfm.data_pipeline.durable.json_files import read_object, take, understood
from amfm.data_pipeline.loader.loader import PretrainLoader
from amfm.data_pipeline.terminal import Report, silent
from amfm.model.divergence import SLICE, Divergence, HeadRows, Outcomes
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.checkpoint.manifest_file import CHECKPOINT_NAME, step_of
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.distillation.store import (
    LOCK,
    MANIFEST,
    VERSION,
    File,
    StoreLayout,
    describe,
    is_sound,
    open_order,
    require_equal,
    stored_teacher,
    when_changed,
)
from amfm.pretrain.distillation.teacher import Teacher, read_rows, require_same_tokens
from amfm.pretrain.micro_batch import MicroBatch
from amfm.pretrain.startup.arithmetic import resolve_precision


@dataclass(frozen=True)
class StoreReport:
    """What was written: the folder, whose probabilities, samples, bytes, and how many files were there before."""

    path: Path
    teacher: str
    samples: int
    bytes: int
    files: int
    kept: int


def write_store(config: RunConfig, device: torch.device, backend: str, report: Report = silent) -> StoreReport:
    """Write the store of `distill.store` for all samples of a run that `check_run` passed; files that are there stay.

    Raises ValueError for a folder that holds another store or other files, and for a teacher of other tokens.
    """
    section, layout = config.distill, StoreLayout.of_run(config)
    assert section is not None and section.store is not None, "checked by the verb"
    folder, loader = Path(section.store), open_order(config)
    folder.mkdir(parents=True, exist_ok=True)
    lock = take_lock(folder / LOCK, wait=False)
    if lock is None:
        raise ValueError(f"distill.store={folder} is being written by another process; wait for it")
    with lock:
        manifest = folder / MANIFEST
        if not manifest.is_file() and any(path.name != LOCK for path in folder.iterdir()):
            raise ValueError(f"distill.store={folder} holds other files; name a folder that is missing or empty")
        written = read_object(manifest) if manifest.is_file() else None
        teacher = Teacher.find(section.teacher, stored_teacher(section.store) if written else None)
        wanted = describe(config, loader, teacher)
        if written is not None:
            require_equal(written, wanted, f"distill.store={folder}")
        else:
            record = {**wanted, "teacher_folder": teacher.folder}
            write_file_atomically(manifest, (json.dumps(record, indent=2) + "\n").encode())
        files = list(layout.files())
        missing = [file for file in files if not file.is_complete(folder)]
        if missing:
            report("reading the teacher")
            weights = teacher.read()
            require_same_tokens(weights, loader.store.tokenizer_identity, config.model.vocab_size, section.teacher)
            dtype = torch.bfloat16 if resolve_precision(config)[0].train.precision == "bf16" else torch.float32
            model = weights.build(backend=backend, device=device, dtype=dtype).requires_grad_(False)
            rows = config.train.micro_batch_size
            divergence = Divergence(section.kind, section.temperature, section.top_k)
            for number, file in enumerate(missing):
                report(f"storing file {number + 1:,} of {len(missing):,}")
                with replacing(folder / file.name) as out:
                    for outcomes in outcomes_of(file, loader, rows, model, divergence):
                        out.write(layout.encode(outcomes))
        loader.close()
    return StoreReport(
        folder, teacher.folder, layout.num_samples, layout.num_bytes(), len(files), len(files) - len(missing)
    )


@torch.no_grad()
def outcomes_of(
    file: File, loader: PretrainLoader, rows: int, model: HybridModel, divergence: Divergence
) -> Iterator[Outcomes]:
    """What a teacher says of each sample of a file, computed `rows` samples at a time."""
    device, groups = model.head_weight().device, single_rank_groups()
    for first in range(file.first, file.first + file.count, rows):
        count = min(rows, file.first + file.count - first)
        loader.seek(first)
        (batch,) = loader.take(count, count)
        given = MicroBatch.from_batch(batch, 0, 1).to(device)
        head = HeadRows(read_rows(model, given.tokens_BT, given.meta).flatten(0, 1), model.head_weight())
        step = max(1, SLICE // len(head.weight_VD))
        slices = [slice(begin, begin + step) for begin in range(0, len(head.read_RD), step)]
        found = [head.outcomes(each, divergence, groups) for each in slices]
        chosen = torch.cat([each.chosen_RK for each in found if each.chosen_RK is not None])
        for log_p, ids in zip(torch.cat([each.log_p for each in found]).chunk(count), chosen.chunk(count)):
            yield Outcomes(log_p, ids)


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
