"""A teacher's likeliest tokens and their probabilities, stored once for every sample of a run, and read back in its order.

A folder with `manifest.json`, which says whose probabilities of what these are, and files of whole samples. The record of a sample
is the CRC-32C of its bytes, the ids [T, K], and log probabilities [T, K + 1] in bf16, the last of all other tokens together;
all records of a file have one size, so that any rank reads any sample with one read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch

from amfm.data_pipeline.durable.json_files import read_object, take
from amfm.data_pipeline.loader.loader import PretrainLoader
from amfm.data_pipeline.samples.mixture import phases_of
from amfm.model.divergence import Outcomes
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.distillation.teacher import Teacher
from amfm.pretrain.stages import data_of_stages, resolve_stages

MANIFEST, FORMAT, VERSION, LOCK = "manifest.json", "amfm-teacher-store", 1, "lock"
FILE_BYTES = 1 << 28  # about, of whole samples
CHECK_BYTES = 4
NOT_THE_ORDER = {
    "version",
    "global_sample",
    "ledger",
    "quarantined",
    "dataset",
}  # of a loader's state; sources have own digests


@dataclass(frozen=True)
class File:
    """Samples [first, first + count) of rows of one length, each in `record` bytes."""

    first: int
    count: int
    length: int
    record: int

    @property
    def name(self) -> str:
        """Name in the folder."""
        return f"samples-{self.first:012d}.bin"

    def is_complete(self, folder: Path) -> bool:
        """Whether it is there and whole; its bytes are checked when they are read."""
        path = folder / self.name
        return path.is_file() and path.stat().st_size == self.count * self.record


@dataclass(frozen=True)
class StoreLayout:
    """How many samples of which lengths there are, and what a token takes. lengths: (first sample, tokens of a row) where they change."""

    num_samples: int
    lengths: tuple[tuple[int, int], ...]
    top_k: int
    id_bytes: int

    @classmethod
    def of_run(cls, config: RunConfig) -> StoreLayout:
        """The layout for all steps of a run, whose section `distill` has a store."""
        assert config.distill is not None and config.distill.top_k is not None, "checked: a store needs top_k"
        stages = resolve_stages(config)
        phases = phases_of(data_of_stages(config, stages), stages[0].train.sequence_length)
        num_samples = stages[-1].first_sample + stages[-1].num_samples()
        lengths = ((phase.start_sample, phase.sequence_length) for phase in phases if phase.start_sample < num_samples)
        id_bytes = cls.id_bytes_of(config.model.vocab_size)
        return cls(num_samples, when_changed(lengths), config.distill.top_k, id_bytes)

    @staticmethod
    def id_bytes_of(vocab_size: int) -> int:
        """Bytes of the id of a token."""
        return 2 if vocab_size <= 1 << 16 else 4

    def record_bytes(self, length: int) -> int:
        """Bytes of a sample."""
        return CHECK_BYTES + length * (self.top_k * self.id_bytes + (self.top_k + 1) * 2)

    def files(self) -> Iterator[File]:
        """All files, in order."""
        ends = [first for first, _ in self.lengths[1:]] + [self.num_samples]
        for (start, length), end in zip(self.lengths, ends):
            record = self.record_bytes(length)
            step = max(1, FILE_BYTES // record)
            for first in range(start, end, step):
                yield File(first, min(step, end - first), length, record)

    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.count * file.record for file in self.files())

    def encode(self, outcomes: Outcomes) -> bytes:
        """The record of a row of tokens, [T, K] and [T, K + 1]."""
        assert outcomes.chosen_RK is not None, "only the likeliest tokens are stored"
        ids = outcomes.chosen_RK.cpu().numpy().astype(f"<u{self.id_bytes}")
        values = outcomes.log_p.to(torch.bfloat16).cpu().view(torch.int16).numpy().astype("<i2")
        content = ids.tobytes() + values.tobytes()
        return google_crc32c.value(content).to_bytes(CHECK_BYTES, "little") + content

    def decode(self, record: bytes, length: int) -> Outcomes:
        """What `encode` wrote. What bf16 rounded away is made good: probabilities sum to 1 in float32."""
        split = CHECK_BYTES + length * self.top_k * self.id_bytes
        ids = np.frombuffer(record[CHECK_BYTES:split], f"<u{self.id_bytes}").astype(np.int64)
        values = np.frombuffer(record[split:], "<i2").astype(np.int16)
        log_p = torch.from_numpy(values).view(torch.bfloat16).float().view(length, self.top_k + 1)
        return Outcomes(log_p.log_softmax(-1), torch.from_numpy(ids).view(length, self.top_k))


def when_changed(lengths: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Of (first sample, tokens of a row), those whose rows are not as long as the ones before."""
    listed = list(lengths)
    return (listed[0], *(now for before, now in pairwise(listed) if now[1] != before[1]))


def is_sound(record: bytes) -> bool:
    """Whether a record has the bytes that `encode` wrote."""
    return record[:CHECK_BYTES] == google_crc32c.value(record[CHECK_BYTES:]).to_bytes(CHECK_BYTES, "little")


def describe(config: RunConfig, loader: PretrainLoader, teacher: Teacher) -> dict[str, Any]:
    """What the probabilities are of; two stores with equal descriptions hold the same ones, but for rounding."""
    section = config.distill
    assert section is not None, "the section that has the store"
    order = {name: value for name, value in loader.state_dict().items() if name not in NOT_THE_ORDER}
    return {
        "format": FORMAT,
        "version": VERSION,
        "teacher": teacher.digest,
        "top_k": section.top_k,
        "temperature": section.temperature,
        "vocab_size": config.model.vocab_size,
        **json.loads(json.dumps(order)),
    }


def open_order(config: RunConfig) -> PretrainLoader:
    """The order of all samples of a run, for one reader."""
    stages = resolve_stages(config)
    train = stages[0].train
    return PretrainLoader(
        data_of_stages(config, stages),
        sequence_length=train.sequence_length,
        micro_batch_size=1,
        seed=config.train.seed,
    )


class TeacherStore:
    """A store to be read: the outcomes of any samples. Raises ValueError for a store that was made of something else."""

    def __init__(self, folder: str, config: RunConfig, loader: PretrainLoader, teacher: Teacher) -> None:
        self.folder, self.layout = Path(folder), StoreLayout.of_run(config)
        require_equal(read_object(self.folder / MANIFEST), describe(config, loader, teacher), f"distill.store={folder}")
        self.files = list(self.layout.files())
        missing = [file for file in self.files if not file.is_complete(self.folder)]
        if missing:
            raise ValueError(
                f"distill.store={folder} lacks {len(missing)} of {len(self.files)} files, first {missing[0].name}; run `amfm distill "
                "store CONFIG` with this configuration, which writes what is missing"
            )
        self._firsts = np.array([file.first for file in self.files])
        self._open: tuple[str, int] | None = None

    def read(self, samples: Sequence[int]) -> Outcomes:
        """Outcomes [B, T, K + 1] of samples of one length; RuntimeError for a damaged one."""
        found = [self._read_one(sample) for sample in samples]
        chosen = [each.chosen_RK for each in found if each.chosen_RK is not None]
        return Outcomes(torch.stack([each.log_p for each in found]), torch.stack(chosen))

    def _read_one(self, sample: int) -> Outcomes:
        file = self.files[int(self._firsts.searchsorted(sample, side="right")) - 1]
        record = os.pread(self._handle(file), file.record, (sample - file.first) * file.record)
        if not is_sound(record):
            raise RuntimeError(
                f"{self.folder / file.name} is damaged at sample {sample}; delete the file and run `amfm distill store CONFIG`, "
                "which writes it from the start"
            )
        return self.layout.decode(record, file.length)

    def _handle(self, file: File) -> int:
        """The open file; the one before is closed."""
        if self._open is None or self._open[0] != file.name:
            self.close()
            self._open = file.name, os.open(self.folder / file.name, os.O_RDONLY)
        return self._open[1]

    def close(self) -> None:
        """Close the open file."""
        if self._open is not None:
            os.close(self._open[1])
            self._open = None


def stored_teacher(folder: str) -> Teacher:
    """The teacher of a store. Raises ValueError if there is none yet."""
    file = Path(folder) / MANIFEST
    if not file.is_file():
        raise ValueError(
            f"distill.store={folder} has no store of a teacher; run `amfm distill store CONFIG`, which writes it"
        )
    written = read_object(file)
    folder, digest = take(written, "teacher_folder", str, file), take(written, "teacher", str, file)
    return Teacher(folder, folder, digest)


def require_equal(written: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    """Reject a store that was made of something else: ValueError names the first field that differs, with both values."""
    for name, value in wanted.items():
        if written.get(name) != value:
            raise ValueError(
                f"{what} was made with {name} {written.get(name)!r:.200}, this run has {value!r:.200}; set it back, or write a store in "
                "another folder"
            )
