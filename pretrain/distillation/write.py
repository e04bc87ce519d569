"""Write a store of a teacher's probabilities: every file whole or not at all, so that what is there is not computed a second time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from amfm.data_pipeline.durable.files import replacing, take_lock, write_file_atomically
from amfm.data_pipeline.durable.foreign_files import read_object
from amfm.data_pipeline.loader.loader import PretrainLoader
from amfm.data_pipeline.terminal import Report, silent
from amfm.model.divergence import SLICE, Divergence, HeadRows, Outcomes
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.distillation.store import (
    LOCK,
    MANIFEST,
    File,
    StoreLayout,
    describe,
    open_order,
    require_equal,
    stored_teacher,
)
from amfm.pretrain.distillation.teacher import Teacher, read_rows, require_same_tokens
from amfm.pretrain.micro_batch import MicroBatch
from amfm.pretrain.startup.precision import settle_precision


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
            dtype = torch.bfloat16 if settle_precision(config)[0].train.precision == "bf16" else torch.float32
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
