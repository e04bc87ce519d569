"""Rows of a synthetic task by global sample number, served like the rows of a token store.

A row is a pure function of (seed, split, task, global sample number, sequence length), so nothing is stored and a resumed
run or another number of ranks sees the same rows. The split a row belongs to is decided by a hash of its tokens:
whatever the seeds, no validation row is ever trained on. Draws of the other split are thrown away and drawn again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from amfm.data_pipeline.samples.mixture import EpochSpan, Mixture, phases_of
from amfm.data_pipeline.samples.packing import Row
from amfm.data_pipeline.samples.permutation import derive_key
from amfm.data_pipeline.samples.samples import NO_TOKENIZER, CorruptSample, SampleReader, SampleSettings
from amfm.data_pipeline.store.manifest import Split
from amfm.data_pipeline.store.node_cache import CacheSettings
from amfm_synthetic.tasks import NOISE, Draws, Int64, SyntheticRow, SyntheticTask, build_task

if TYPE_CHECKING:
    from amfm.data_pipeline.config import DataConfig  # pydantic takes longer to import than everything here

GENERATOR_VERSION = 1  # of what a sample number gives: another one refuses to resume
SPLIT_PARTS = 8  # of this many equal parts of all rows one validates
MAX_DRAWS = 8192  # a split that holds rows at all gives one with far fewer


@dataclass(frozen=True, kw_only=True)
class SyntheticSettings(SampleSettings):
    """Everything that decides the rows, picklable for reading processes.

    `name` is that of the only source; `phases` change nothing but the sequence length. There is no store to read or cache.
    """

    name: str
    task: SyntheticTask

    @staticmethod
    def from_config(config: DataConfig, *, split: Split, sequence_length: int, seed: int) -> SyntheticSettings:
        """Derive the settings of a run. Raises ValueError for settings of the task that do not fit together."""
        assert config.synthetic is not None, "the data is a synthetic task"
        phases = phases_of(config, sequence_length)
        return SyntheticSettings(
            store="",
            split=split,
            seed=seed,
            packing="none",
            shuffle="none",
            phases=phases if split == "train" else phases[:1],
            on_corruption="raise",
            cache=CacheSettings(**config.cache.model_dump()),
            name=config.synthetic.task,
            task=build_task(config.synthetic),
        )

    def open_reader(self) -> SyntheticReader:
        """Open a reader of these rows."""
        return SyntheticReader(self)


class ComputedStore:
    """Stand-in for the token store of text: names what the rows depend on, and holds no file."""

    tokenizer_identity, remote_cache = NO_TOKENIZER, None

    def __init__(self, task: SyntheticTask) -> None:
        self.vocab_size = task.vocab_size
        self._identity = f"probe-{derive_key(GENERATOR_VERSION, repr(task)).hex()[:32]}"

    def identity(self) -> str:
        """Return the identity of the task and its settings, which a resumed run must match."""
        return self._identity

    def source_identity(self, source: str, split: Split) -> str:
        """Return the identity of the task: it is the only source."""
        return self._identity

    def close(self) -> None:
        """Do nothing: no file is open."""


class SyntheticReader(SampleReader):
    """Reader of synthetic rows: any sample numbers, in any order, on any rank.

    Raises ValueError when the rows are shorter than the task needs or the split has none of their length.
    """

    settings: SyntheticSettings

    def __init__(self, settings: SyntheticSettings) -> None:
        self.settings = settings
        self.store: Any = ComputedStore(settings.task)
        self.source_names = (settings.name,)
        self.mixture = Mixture([(phase.start_sample, phase.weights) for phase in settings.phases], settings.seed)
        for phase in settings.phases:
            self._check_length(phase.sequence_length)

    def sequence_length_at(self, sample: int) -> int:
        """Return the number of tokens in the row of a global sample."""
        return [phase.sequence_length for phase in self.settings.phases if phase.start_sample <= sample][-1]

    def stretches(self, source: str) -> tuple[EpochSpan, ...]:
        """Return no spans: rows never repeat, so no change of their length cuts an epoch short."""
        return ()

    def epochs_after(self, source: str, draws: int) -> float:
        """Return 0: rows never repeat, so no epoch ends."""
        return 0.0

    def read(self, samples: Int64) -> tuple[list[Row], list[CorruptSample]]:
        """Make the rows of global samples; the second list, of corrupt samples, is always empty."""
        return [self._make_row(sample) for sample in samples.tolist()], []

    def read_block(self, first: int, count: int, stride: int) -> tuple[list[Row], list[CorruptSample]]:
        """Make the rows of global samples [first, first + count); `stride` serves readers that prefetch, and is unused."""
        return self.read(np.arange(first, first + count))

    def make_synthetic_row(self, sample: int, length: int) -> SyntheticRow:
        """Make the row of a global sample: the first of its draws that belongs to the split."""
        settings = self.settings
        for attempt in range(MAX_DRAWS):
            key = derive_key("probe", settings.seed, settings.split, sample, attempt)
            row = settings.task.make_row(Draws(key), length)
            if split_of(row) == settings.split:
                return row
        raise ValueError(
            f"no {settings.split} sequence of {length} tokens was found for the synthetic task {settings.name}: there are too few "
            "different rows; use longer sequences"
        )

    def _make_row(self, sample: int) -> Row:
        length = self.sequence_length_at(sample)
        row = self.make_synthetic_row(sample, length)
        tokens = np.append(row.tokens_T, NOISE)  # the last is only ever a label, and labels are given
        return Row(tokens, np.zeros(1, np.int32), length + 1, sample, 0, row.labels_T)

    def _check_length(self, length: int) -> None:
        shortest = self.settings.task.shortest
        if length < shortest:
            raise ValueError(
                f"sequences of {length} tokens are too short for the synthetic task {self.settings.name} with these settings; use "
                f"{shortest} at least"
            )
        self.make_synthetic_row(0, length)


def split_of(row: SyntheticRow) -> Split:
    """Return the split that a row belongs to, from a hash of its tokens."""
    digest = hashlib.blake2b(row.tokens_T.astype("<i8").tobytes(), digest_size=1).digest()
    return "validation" if digest[0] % SPLIT_PARTS == 0 else "train"
