"""Global sample number -> row of a probe. numpy only, for reading processes.

A row is a pure function of (seed, split, task, global sample number, length of rows). Which split a row belongs to is
decided by its tokens, so that no row of one split can occur in the other, whatever the seeds.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.probes.build import build_task
from data_pipeline.probes.draws import Draws, Int64
from data_pipeline.probes.task import NOISE, ProbeRow, ProbeTask
from data_pipeline.samples.mixture import Mixture
from data_pipeline.samples.packing import Row
from data_pipeline.samples.permutation import derive_key
from data_pipeline.samples.samples import CorruptSample, EpochSpan, PhaseSettings
from data_pipeline.store.manifest import Split

if TYPE_CHECKING:
    from data_pipeline.config import ProbeConfig  # pydantic takes longer to import than everything here

NO_TOKENIZER = "none"  # in the place of a tokenizer's identity
GENERATOR_VERSION = 1  # of what a sample number gives: another one refuses to resume
SPLIT_PARTS = 8  # of so many equal parts of all rows one validates
MAX_DRAWS = 8192  # a split that holds rows at all gives one with far fewer


@dataclass(frozen=True)
class ProbeSettings:
    """What decides the rows. name: of the only source. phases: of equal weights, with the lengths of rows."""

    name: str
    task: ProbeTask
    split: Split
    seed: int
    phases: tuple[PhaseSettings, ...]
    packing: str = "none"
    shuffle: str = "none"

    @staticmethod
    def from_config(
        config: ProbeConfig, phases: tuple[PhaseSettings, ...], *, split: Split, seed: int
    ) -> ProbeSettings:
        """Settings of a run; ValueError for settings of the task that don't fit together."""
        return ProbeSettings(config.task, build_task(config), split, seed, phases if split == "train" else phases[:1])

    def open_reader(self) -> ProbeReader:
        """A reader of these rows."""
        return ProbeReader(self)


class ComputedStore:
    """Stands where the token store of text stands: what the rows depend on, and no file."""

    tokenizer_identity = NO_TOKENIZER

    def __init__(self, task: ProbeTask) -> None:
        self.vocab_size = task.vocab_size
        self._identity = f"probe-{derive_key(GENERATOR_VERSION, repr(task)).hex()[:32]}"

    def identity(self) -> str:
        """Of the task and its settings."""
        return self._identity

    def source_identity(self, source: str, split: Split) -> str:
        """That of the whole: there is one source."""
        return self._identity

    def close(self) -> None:
        """Nothing is open."""


class ProbeReader:
    """Makes the rows of any global sample numbers, in any order and on any rank alike: `SampleReader` for probes.

    ValueError when the rows are shorter than the task needs or the split has none of their length.
    """

    def __init__(self, settings: ProbeSettings) -> None:
        self.settings, self.store = settings, ComputedStore(settings.task)
        self.source_names = (settings.name,)
        self.mixture = Mixture([(phase.start_sample, phase.weights) for phase in settings.phases], settings.seed)
        for phase in settings.phases:
            self._check_length(phase.sequence_length)

    def sequence_length_at(self, sample: int) -> int:
        """Tokens in the row of a global sample."""
        return [phase.sequence_length for phase in self.settings.phases if phase.start_sample <= sample][-1]

    def stretches(self, source: str) -> tuple[EpochSpan, ...]:
        """Rows are never drawn again, so no change of their length cuts an epoch short."""
        return ()

    def epochs_after(self, source: str, draws: int) -> float:
        """None is ever full."""
        return 0.0

    def read(self, samples: Int64) -> tuple[list[Row], list[CorruptSample]]:
        """Rows of global samples; nothing can be damaged."""
        return [self._make_row(sample) for sample in samples.tolist()], []

    def read_block(self, first: int, count: int, stride: int) -> tuple[list[Row], list[CorruptSample]]:
        """Rows of the global samples [first, first + count); stride is for readers that look ahead."""
        return self.read(np.arange(first, first + count))

    def make_probe_row(self, sample: int, length: int) -> ProbeRow:
        """The row of a global sample: the first of its draws that belongs to the split."""
        settings = self.settings
        for attempt in range(MAX_DRAWS):
            key = derive_key("probe", settings.seed, settings.split, sample, attempt)
            row = settings.task.make_row(Draws(key), length)
            if split_of(row) == settings.split:
                return row
        raise ValueError(
            f"no {settings.split} row of {length} tokens was found for the probe {settings.name}: there are too few "
            "different rows; use longer rows"
        )

    def _make_row(self, sample: int) -> Row:
        length = self.sequence_length_at(sample)
        row = self.make_probe_row(sample, length)
        tokens = np.append(row.tokens_T, NOISE)  # the last is only ever a label, and labels are given
        return Row(tokens, np.zeros(1, np.int32), length + 1, sample, 0, row.labels_T)

    def _check_length(self, length: int) -> None:
        shortest = self.settings.task.shortest
        if length < shortest:
            raise ValueError(
                f"rows of {length} tokens are too short for the probe {self.settings.name} with these settings; use "
                f"{shortest} at least"
            )
        self.make_probe_row(0, length)


def split_of(row: ProbeRow) -> Split:
    """The split that a row belongs to, from a hash of its tokens."""
    digest = hashlib.blake2b(row.tokens_T.astype("<i8").tobytes(), digest_size=1).digest()
    return "validation" if digest[0] % SPLIT_PARTS == 0 else "train"
