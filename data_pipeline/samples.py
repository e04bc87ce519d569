"""Global sample number -> row: mixture, shuffle, window or bin, read and verified. numpy only, for reading processes.

Everything here is a pure function of (settings, dataset identities, global sample number).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from data_pipeline.bins import BinIndex
from data_pipeline.mixture import Mixture
from data_pipeline.packing import Row, count_windows, starts_in_window
from data_pipeline.permutation import derive_key, permute, permute_in_blocks
from data_pipeline.shards import DamagedError
from data_pipeline.store import Part, Split, TokenStore

if TYPE_CHECKING:
    from data_pipeline.config import DataConfig  # pydantic takes longer to import than everything here

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SampleSettings:
    """What decides the order and the rows. phases: (first global sample, weight by source), the first at 0."""

    store: str
    split: Split
    sequence_length: int
    seed: int
    packing: Literal["concatenate", "best_fit"]
    shuffle: Literal["full", "block"]
    phases: tuple[tuple[int, Mapping[str, float]], ...]
    on_corruption: Literal["raise", "quarantine"]

    @staticmethod
    def from_config(config: DataConfig, *, split: Split, sequence_length: int, seed: int) -> SampleSettings:
        """Settings of a run; ValueError for a phase that weighs a source the configuration doesn't have."""
        return SampleSettings(
            store=config.store,
            split=split,
            sequence_length=sequence_length,
            seed=seed,
            packing=config.packing,
            shuffle=config.shuffle,
            phases=_phases(config),
            on_corruption=config.on_corruption,
        )


def _phases(config: DataConfig) -> tuple[tuple[int, dict[str, float]], ...]:
    """The sources' own weights from sample 0, unless a given phase starts there, then the given phases."""
    weights = {source.name: source.weight for source in config.sources}
    later = tuple((phase.start_sample, dict(phase.weights)) for phase in config.phases)
    for start, changed in later:
        unknown = sorted(set(changed) - set(weights))
        if unknown:
            raise ValueError(
                f"data.phases: the phase at sample {start} weighs {unknown[0]!r}, which must be one of data.sources: "
                f"{', '.join(sorted(weights))}"
            )
    return later if later and later[0][0] == 0 else ((0, weights), *later)


@dataclass(frozen=True)
class Damage:
    """A sample that could not be read and was given as a row without labels."""

    sample: int
    part: str
    reason: str


@dataclass(frozen=True)
class Place:
    """Where a sample lies: row `row` of a part, drawn in an epoch of its source."""

    source: str
    epoch: int
    part: Part
    row: int


class SampleReader:
    """Reads the rows of any global sample numbers, in any order and on any rank alike."""

    def __init__(self, settings: SampleSettings, store: TokenStore | None = None) -> None:
        self.settings = settings
        self.store = store or TokenStore.open(settings.store)
        names = sorted({name for _, weights in settings.phases for name in weights})
        self._bins = BinIndex(self.store, settings.sequence_length) if settings.packing == "best_fit" else None
        self._row_bounds = {name: np.cumsum([0, *self._count_rows(name)], dtype=np.int64) for name in names}
        self.source_names = tuple(names)
        self.mixture = Mixture(self._usable_phases(), settings.seed)
        self._identities = {name: self.store.source_identity(name, settings.split) for name in names}

    def rows_per_epoch(self, source: str) -> int:
        """Rows of one pass over a source."""
        return int(self._row_bounds[source][-1])

    def locate(self, samples: Int64) -> list[Place]:
        """Where each global sample lies."""
        draws = self.mixture.draws(samples)
        places: list[Place | None] = [None] * len(draws)
        for source in {name for name, _ in draws}:
            where = [number for number, (name, _) in enumerate(draws) if name == source]
            epochs, positions = np.divmod([draws[number][1] for number in where], self.rows_per_epoch(source))
            rows = self._shuffled(source, epochs, positions)
            for number, epoch, row in zip(where, epochs.tolist(), rows.tolist()):
                places[number] = Place(source, epoch, *self._find_part(source, row))
        return [place for place in places if place is not None]

    def read(self, samples: Int64) -> tuple[list[Row], list[Damage]]:
        """Rows of global samples; a damaged one raises, or is a row without labels and a note when quarantined."""
        rows, damages = [], []
        for sample, place in zip(samples.tolist(), self.locate(samples)):
            source = self.source_names.index(place.source)
            try:
                row = self._read_bin(place, sample, source) if self._bins else self._read_window(place, sample, source)
            except DamagedError as error:
                if self.settings.on_corruption == "raise":
                    raise
                damages.append(Damage(sample, place.part.path, str(error)))
                row = self._empty_row(sample, source)
            rows.append(row)
        return rows, damages

    def first_token(self, place: Place) -> int:
        """Offset in the part of the first token of a row."""
        if self._bins:
            bins = self._bins.load(place.part)
            return int(bins.first[bins.bin_offsets[place.row]])
        return place.row * self.settings.sequence_length

    def _usable_phases(self) -> list[tuple[int, dict[str, float]]]:
        """Phases over the sources that have rows: a small source may have nothing to validate on."""
        usable = []
        for start, weights in self.settings.phases:
            empty = [name for name in sorted(weights) if self.rows_per_epoch(name) == 0]
            kept = {name: weight for name, weight in weights.items() if name not in empty}
            if empty and (self.settings.split == "train" or not kept):
                raise ValueError(self._explain_empty(empty[0]))
            usable.append((start, kept))
        return usable

    def _explain_empty(self, source: str) -> str:
        split, length = self.settings.split, self.settings.sequence_length
        parts = self.store.parts(source, split)
        longest = max((part.num_tokens for part in parts), default=0)
        if longest == 0:
            return (
                f"source {source!r} has no {split} documents in the store {self.settings.store}; give more documents "
                "(one file of text is one document) or raise data.validation_fraction, and run `amfm prepare CONFIG`"
            )
        return (
            f"train.sequence_length={length} must be below the {longest} tokens of the largest {split} part of source "
            f"{source!r}; shorten it, or give more text"
        )

    def _count_rows(self, source: str) -> list[int]:
        parts = self.store.parts(source, self.settings.split)
        if self._bins:
            return self._bins.count(source, self.settings.split)
        return [count_windows(part.num_tokens, self.settings.sequence_length) for part in parts]

    def _shuffled(self, source: str, epochs: Int64, positions: Int64) -> Int64:
        size, out = self.rows_per_epoch(source), np.empty_like(positions)
        for epoch in set(epochs.tolist()):
            mine = epochs == epoch
            key = derive_key(self.settings.seed, "order", self._identities[source], epoch)
            shuffle = permute_in_blocks if self.settings.shuffle == "block" else permute
            out[mine] = shuffle(positions[mine], size, key)
        return out

    def _find_part(self, source: str, row: int) -> tuple[Part, int]:
        bounds = self._row_bounds[source]
        number = int(bounds.searchsorted(row, side="right")) - 1
        return self.store.parts(source, self.settings.split)[number], row - int(bounds[number])

    def _read_window(self, place: Place, sample: int, source: int) -> Row:
        length = self.settings.sequence_length
        first = place.row * length
        tokens = self.store.read_tokens(place.part, first, first + length + 1)
        starts = starts_in_window(self.store.document_ends(place.part), first, length + 1)
        return Row(tokens, starts, length + 1, sample, source)

    def _read_bin(self, place: Place, sample: int, source: int) -> Row:
        assert self._bins is not None, "bins are read when packing is best_fit"
        length = self.settings.sequence_length
        bins = self._bins.load(place.part)
        pieces = range(int(bins.bin_offsets[place.row]), int(bins.bin_offsets[place.row + 1]))
        firsts, lengths = bins.first[pieces.start : pieces.stop], bins.length[pieces.start : pieces.stop]
        starts = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)[:-1])).astype(np.int32)
        num_valid = int(lengths.sum())
        end = int(firsts[0] + lengths[0])
        if len(pieces) == 1 and num_valid == length and not self._is_document_end(place.part, end):
            return Row(self.store.read_tokens(place.part, end - length, end + 1), starts, length + 1, sample, source)
        tokens = np.full(length + 1, self._fill_id(), dtype=self.store.layout.dtype)
        for start, first, size in zip(starts.tolist(), firsts.tolist(), lengths.tolist()):
            tokens[start : start + size] = self.store.read_tokens(place.part, first, first + size)
        return Row(tokens, starts, num_valid, sample, source)

    def _is_document_end(self, part: Part, offset: int) -> bool:
        ends = self.store.document_ends(part)
        return int(ends[np.searchsorted(ends, offset)]) == offset

    def _empty_row(self, sample: int, source: int) -> Row:
        tokens = np.full(self.settings.sequence_length + 1, self._fill_id(), dtype=self.store.layout.dtype)
        return Row(tokens, np.zeros(1, np.int32), 1, sample, source)

    def _fill_id(self) -> int:
        pad = self.store.tokenizer.pad_id
        return self.store.eos_id if pad is None else pad
