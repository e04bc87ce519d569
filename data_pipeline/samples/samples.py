"""From store to batch in four steps: the row of a global sample number.

1. Mixture (`mixture.py`): the number gives the source it is drawn from, and how many draws of that source came before.
2. Shuffle (`permutation.py`): that draw, within its epoch, is permuted by a keyed bijection to a place in the source.
3. Window or bin (`packing.py`): the place is a run of the joined documents, or documents fitted into a row.
4. Read (`store/`): its chunks are read and verified, and the row is cut into documents; `loader/` stacks rows to batches.
   Where only some tokens are learned the row brings its labels (`packing.py`); where a source asks for it, middles are
   moved to the end (`fim.py`).

Every step is a pure function of (settings, identities of the data, global sample number). There is no state to save and
no order to replay: a resumed run, another number of ranks and every reading process compute the same row. Only numpy is
imported, because reading processes start with this file.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from amfm.data_pipeline.samples.mixture import EpochSpan, Mixture, PhaseSettings, Shift, phases_of
from amfm.data_pipeline.samples.packing import BinIndex, Row, count_windows, is_counted, label_counted, starts_in_window
from amfm.data_pipeline.samples.permutation import (
    BLOCK_WINDOWS,
    BLOCKS_PER_SHUFFLE,
    derive_key,
    permute,
    permute_in_blocks,
)
from amfm.data_pipeline.store.manifest import Part, Split
from amfm.data_pipeline.store.node_cache import CacheSettings
from amfm.data_pipeline.store.shards import DamagedError
from amfm.data_pipeline.store.store import TokenStore

if TYPE_CHECKING:
    from amfm.data_pipeline.config import DataConfig  # pydantic takes longer to import than everything here
    from amfm.data_pipeline.samples.fim import FimSettings

Int64 = npt.NDArray[np.int64]

NO_TOKENIZER = "none"  # instead of a tokenizer's identity, of rows that are computed
LOCATED_AHEAD = 512  # samples: from here on the cost of a place is that of its arithmetic


class NoRowsError(ValueError):
    """No source has a row for a split: it has no documents, or none as long as a row."""


@dataclass(frozen=True)
class SampleSettings:
    """What decides the order and the rows. The first phase starts at sample 0."""

    store: str
    split: Split
    seed: int
    packing: str
    shuffle: str
    phases: tuple[PhaseSettings, ...]
    on_corruption: Literal["raise", "quarantine"]
    cache: CacheSettings
    fim: Mapping[str, FimSettings] = field(default_factory=dict)

    @staticmethod
    def from_config(config: DataConfig, *, split: Split, sequence_length: int, seed: int) -> SampleSettings:
        """Settings of a run; ValueError for a phase that weighs a source the configuration does not have.

        sequence_length: of the first phase. Validation is only the first phase, and nothing is moved in it, so that its losses
        stay comparable.
        """
        phases = phases_of(config, sequence_length)
        return SampleSettings(
            store=config.text_store(),
            split=split,
            seed=seed,
            packing=config.packing,
            shuffle=config.shuffle,
            phases=phases if split == "train" else (replace(phases[0], skipped=0),),
            on_corruption=config.on_corruption,
            cache=CacheSettings(**config.cache.model_dump()),
            fim=_fim_of(config) if split == "train" else {},
        )

    def open_reader(self) -> SampleReader:
        """Open a reader of these rows, with its own store."""
        return SampleReader(self)


@dataclass(frozen=True)
class CorruptSample:
    """A sample that could not be read and was given as a row without labels."""

    sample: int
    part: str
    reason: str


class SampleLocation(NamedTuple):
    """Where a sample is: row `row` of a part cut into rows of a length, drawn in an epoch of its source."""

    source: str
    epoch: int
    part: Part
    row: int
    sequence_length: int


class SampleReader:
    """Reads the rows of any global sample numbers, in any order and on any rank alike."""

    def __init__(self, settings: SampleSettings, store: TokenStore | None = None) -> None:
        self.settings = settings
        self.store = store or TokenStore.open(settings.store, settings.cache)
        self._bins: dict[int, BinIndex] = {}
        self._row_bounds: dict[tuple[str, int], Int64] = {}
        self._located: dict[tuple[int, int], list[SampleLocation]] = {}
        for phase in settings.phases:
            for name in phase.weights:
                self._count_source(name, phase.sequence_length)
        self.source_names = tuple(sorted({name for name, _ in self._row_bounds}))
        phases = self._usable_phases()
        shifts = {each.start_sample: Shift(each.skipped, each.continues) for each in settings.phases if each.skipped}
        self.mixture = Mixture(phases, settings.seed, shifts)
        self._stretches = {name: self._find_stretches(name) for name in self.source_names}
        self._identities = {name: self.store.source_identity(name, settings.split) for name in self.source_names}
        self._fim = {
            name: fim.open(self.store, name) for name, fim in settings.fim.items() if name in self.source_names
        }
        self._check_cache()

    def rows_per_epoch(self, source: str, sequence_length: int | None = None) -> int:
        """Count the rows of one pass over a source; sequence_length defaults to the one that the source starts with."""
        length = sequence_length or next(p.sequence_length for p in self.settings.phases if source in p.weights)
        return int(self._row_bounds[source, length][-1])

    def sequence_length_at(self, sample: int) -> int:
        """Tokens in the row of a global sample."""
        return [phase.sequence_length for phase in self.settings.phases if phase.start_sample <= sample][-1]

    def stretches(self, source: str) -> Sequence[EpochSpan]:
        """Return the spans of one sequence length into which the draws of a source fall, in order."""
        return self._stretches[source]

    def epochs_after(self, source: str, draws: int) -> float:
        """Compute the passes over a source that its first `draws` draws make, fractions included."""
        stretches, epochs = self._stretches[source], 0.0
        for number, stretch in enumerate(stretches):
            end = stretches[number + 1].first_draw if number + 1 < len(stretches) else draws
            epochs += max(0, min(draws, end) - stretch.first_draw) / stretch.rows_per_epoch
        return epochs

    def with_own_files(self) -> SampleReader:
        """Copy the reader for another thread: same rows, no open file in common."""
        other = copy.copy(self)
        other.store = self.store.with_own_files()
        other._bins = {length: BinIndex(other.store, length) for length in self._bins}
        other._located = {}
        return other

    def locate(self, samples: Int64) -> list[SampleLocation]:
        """Locate each global sample: mixture, then shuffle; nothing of the store's tokens is read.

        Samples are handled by source and epoch in arrays, because each array operation costs as much as tens of samples.
        """
        places: dict[int, SampleLocation] = {}
        for source, (where, draws) in self.mixture.draws_by_source(samples).items():
            parts = self.store.parts(source, self.settings.split)
            firsts = [stretch.first_draw for stretch in self._stretches[source]]
            which = np.searchsorted(firsts, draws, side="right") - 1
            for number in np.unique(which).tolist():
                stretch, mine = self._stretches[source][number], which == number
                epochs, positions = np.divmod(draws[mine] - stretch.first_draw, stretch.rows_per_epoch)
                epochs += stretch.first_epoch
                rows = self._shuffled(source, stretch.rows_per_epoch, epochs, positions)
                bounds = self._row_bounds[source, stretch.sequence_length]
                chosen = bounds.searchsorted(rows, side="right") - 1
                rows -= bounds[chosen]
                for sample, epoch, part, row in zip(
                    where[mine].tolist(), epochs.tolist(), chosen.tolist(), rows.tolist()
                ):
                    places[sample] = SampleLocation(source, epoch, parts[part], row, stretch.sequence_length)
        return [places[number] for number in range(len(samples))]

    def read(self, samples: Int64) -> tuple[list[Row], list[CorruptSample]]:
        """Read rows of global samples; a damaged one raises, or is a row without labels and a note when quarantined.

        A quarantined sample keeps its number: to take another row in its place would shift or repeat what comes after.
        """
        return self._read_places(samples.tolist(), self.locate(samples))

    def read_block(self, first: int, count: int, stride: int) -> tuple[list[Row], list[CorruptSample]]:
        """Rows of the global samples [first, first + count), as `read` gives them.

        stride: from this block to the one that is wanted next. The places of the next blocks are found together:
        for just one block that would cost as much as reading it.
        """
        if (first, count) not in self._located:
            firsts = np.arange(first, first + max(1, LOCATED_AHEAD // count) * stride, stride)
            samples = firsts[:, None] + np.arange(count)
            places = self.locate(samples.reshape(-1))
            self._located = {
                (start, count): places[number * count : (number + 1) * count]
                for number, start in enumerate(firsts.tolist())
            }
        return self._read_places(range(first, first + count), self._located.pop((first, count)))

    def _read_places(
        self, samples: Sequence[int], places: Sequence[SampleLocation]
    ) -> tuple[list[Row], list[CorruptSample]]:
        rows, damages = [], []
        for sample, place in zip(samples, places):
            source = self.source_names.index(place.source)
            try:
                row = self._read_bin(place, sample, source) if self._bins else self._read_window(place, sample, source)
                self._check_ids(row, place)
                row = self._shape(row, place, sample)
            except DamagedError as error:
                if self.settings.on_corruption == "raise":
                    raise
                damages.append(CorruptSample(sample, place.part.path, str(error)))
                row = self._empty_row(place, sample, source)
            rows.append(row)
        return rows, damages

    def first_token(self, place: SampleLocation) -> int:
        """Offset in the part of the first token of a row."""
        if self._bins:
            bins = self._bins[place.sequence_length].load(place.part)
            return int(bins.first[bins.bin_offsets[place.row]])
        return place.row * place.sequence_length

    def _usable_phases(self) -> list[tuple[int, dict[str, float]]]:
        """Phases over the sources that have rows: a small source may have nothing to validate on."""
        usable = []
        for phase in self.settings.phases:
            length = phase.sequence_length
            empty = [name for name in sorted(phase.weights) if self.rows_per_epoch(name, length) == 0]
            kept = {name: weight for name, weight in phase.weights.items() if name not in empty}
            if empty and (self.settings.split == "train" or not kept):
                raise NoRowsError(self._explain_empty(empty[0], length))
            usable.append((phase.start_sample, kept))
        return usable

    def _find_stretches(self, source: str) -> list[EpochSpan]:
        """Where a source changes its sequence length, by the number of its draw."""
        found: list[EpochSpan] = []
        for phase, settings in zip(self.mixture.phases, self.settings.phases):
            length = settings.sequence_length
            if source not in phase.sources or (found and found[-1].sequence_length == length):
                continue
            first, epoch, repeats = phase.first_draws[phase.sources.index(source)], 0, 0.0
            if found:
                passes = (first - found[-1].first_draw) / found[-1].rows_per_epoch
                epoch, repeats = found[-1].first_epoch + math.ceil(passes), passes % 1
            found.append(EpochSpan(first, epoch, length, self.rows_per_epoch(source, length), repeats))
        return found

    def _check_cache(self) -> None:
        """What is read at random must fit the node cache, or most samples would cost a request."""
        cache, needed = self.store.remote_cache, 0
        if cache is None:
            return
        for source in filter(self._stretches.get, self.source_names):
            num_bytes = sum(sum(part.token_shards) for part in self.store.parts(source, self.settings.split))
            longest = max(stretch.sequence_length for stretch in self._stretches[source])
            shuffled = BLOCK_WINDOWS * BLOCKS_PER_SHUFFLE * longest * np.dtype(self.store.layout.dtype).itemsize
            needed += num_bytes if self.settings.shuffle == "full" else min(num_bytes, shuffled)
        if needed > cache.max_bytes:
            raise ValueError(
                f"data.cache.max_bytes={cache.max_bytes} must be at least {needed}, the bytes that "
                f"data.shuffle={self.settings.shuffle} reads at random from {self.store.location}; raise it"
                f"{', or use data.shuffle=block' if self.settings.shuffle == 'full' else ''}"
            )

    def _explain_empty(self, source: str, length: int) -> str:
        """Message for a source that has no rows: no documents at all, or no part as long as a row."""
        split = self.settings.split
        parts = self.store.parts(source, split)
        longest = max((part.num_tokens for part in parts), default=0)
        if longest == 0:
            return (
                f"source {source!r} has no {split} documents in the store {self.settings.store}; give more documents "
                "(one file of text is one document) or raise data.validation_fraction, and run `amfm prepare CONFIG`; or "
                "hold nothing out, with data.validation_fraction=0"
            )
        more = "" if split == "train" else "raise data.validation_fraction and run `amfm prepare CONFIG` again, "
        return (
            f"train.sequence_length={length} must be below the {longest} tokens of the largest {split} part of source "
            f"{source!r}; {more}give more text, or shorten the sequences"
        )

    def _count_source(self, source: str, length: int) -> None:
        """Keep the number of the first row of each part, for one sequence length: where a row of the source is found."""
        if (source, length) in self._row_bounds:
            return
        split = self.settings.split
        if self.settings.packing == "best_fit":
            rows = self._bins.setdefault(length, BinIndex(self.store, length)).count(source, split)
        else:
            rows = [count_windows(part.num_tokens, length) for part in self.store.parts(source, split)]
        self._row_bounds[source, length] = np.cumsum([0, *rows], dtype=np.int64)

    def _shuffled(self, source: str, size: int, epochs: Int64, positions: Int64) -> Int64:
        """Permute positions within their epochs; the key has the source's identity, so other data gives another order."""
        out = np.empty_like(positions)
        for epoch in set(epochs.tolist()):
            mine = epochs == epoch
            key = derive_key(self.settings.seed, "order", self._identities[source], epoch)
            shuffle = permute_in_blocks if self.settings.shuffle == "block" else permute
            out[mine] = shuffle(positions[mine], size, key)
        return out

    def _read_window(self, place: SampleLocation, sample: int, source: int) -> Row:
        """Read T + 1 neighbouring tokens of a part, whatever documents they belong to."""
        length = place.sequence_length
        first = place.row * length
        tokens = self.store.read_tokens(place.part, first, first + length + 1)
        starts = starts_in_window(self.store.document_ends(place.part), first, length + 1)
        return Row(tokens, starts, length + 1, sample, source, self._labels(place.part, tokens, [(first, length + 1)]))

    def _read_bin(self, place: SampleLocation, sample: int, source: int) -> Row:
        """Read the pieces of a bin one after another and fill the rest of the row."""
        length = place.sequence_length
        bins = self._bins[length].load(place.part)
        pieces = range(int(bins.bin_offsets[place.row]), int(bins.bin_offsets[place.row + 1]))
        firsts, lengths = bins.first[pieces.start : pieces.stop], bins.length[pieces.start : pieces.stop]
        starts = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)[:-1])).astype(np.int32)
        num_valid = int(lengths.sum())
        end = int(firsts[0] + lengths[0])
        # A full row out of a longer document: its last token has a label, the document's next token.
        if len(pieces) == 1 and num_valid == length and not self._is_document_end(place.part, end):
            tokens = self.store.read_tokens(place.part, end - length, end + 1)
            labels = self._labels(place.part, tokens, [(end - length, length + 1)])
            return Row(tokens, starts, length + 1, sample, source, labels)
        tokens = np.full(length + 1, self._fill_id(), dtype=self.store.layout.dtype)
        for start, first, size in zip(starts.tolist(), firsts.tolist(), lengths.tolist()):
            tokens[start : start + size] = self.store.read_tokens(place.part, first, first + size)
        labels = self._labels(place.part, tokens, zip(firsts.tolist(), lengths.tolist()))
        return Row(tokens, starts, num_valid, sample, source, labels)

    def _shape(self, row: Row, place: SampleLocation, sample: int) -> Row:
        """Move middles to the end where the source of a row asks for it."""
        if place.source not in self._fim:
            return row
        key = derive_key(self.settings.seed, "fim", self._identities[place.source], sample)
        return self._fim[place.source](row, key)

    def _labels(self, part: Part, tokens: npt.NDArray[np.generic], pieces: Iterable[tuple[int, int]]) -> Int64 | None:
        """Labels of a row that begins with these pieces of a part, (first, length) each; None where all tokens are learned."""
        spans = self.store.loss_spans(part)
        if spans is None:
            return None
        return label_counted(tokens, [is_counted(spans, first, length) for first, length in pieces])

    def _check_ids(self, row: Row, place: SampleLocation) -> None:
        """Raise DamagedError for a token outside the vocabulary: every checksum may hold, and the embedding has no row."""
        largest = int(row.tokens.max())
        if largest >= self.store.vocab_size:
            raise DamagedError(
                f"{self.store.location}/{place.part.path} is damaged: row {place.row} of {place.sequence_length} tokens holds "
                f"token id {largest}, outside the vocabulary of {self.store.vocab_size}; delete the part and prepare again"
            )

    def _is_document_end(self, part: Part, offset: int) -> bool:
        ends = self.store.document_ends(part)
        return int(ends[np.searchsorted(ends, offset)]) == offset

    def _empty_row(self, place: SampleLocation, sample: int, source: int) -> Row:
        """Make a row without labels instead of a damaged one: one token is valid, and it has no next one."""
        tokens = np.full(place.sequence_length + 1, self._fill_id(), dtype=self.store.layout.dtype)
        return Row(tokens, np.zeros(1, np.int32), 1, sample, source)

    def _fill_id(self) -> int:
        pad = self.store.tokenizer.pad_id
        return self.store.eos_id if pad is None else pad


def _fim_of(config: DataConfig) -> dict[str, FimSettings]:
    """How sources are cut, of those that ask for it."""
    if all(source.fim is None for source in config.sources):
        return {}
    from amfm.data_pipeline.samples.fim import FimSettings  # where a source asks for it

    asked = {source.name: source.fim for source in config.sources if source.fim is not None}
    return {name: FimSettings(fim.rate, fim.kind, fim.tokens) for name, fim in asked.items()}
