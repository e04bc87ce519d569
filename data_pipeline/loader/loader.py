"""The resumable stream of batches: the same global order for every world size, micro-batch, worker count and resume.

A sample is a number. What it holds is a pure function of that number, the seed, the settings and the store (samples/), so
the state of the stream is one integer, the cursor, and a resume needs no replay. The rest of the state exists to reject a
resume that would silently train on other data: identities of what past samples came from.

Reading processes only compute rows ahead of the cursor. They may be any number and may be killed; what they had read is
asked for again. Batches are assembled in the training process and not there: a row takes 2 or 4 bytes per token in a
pipe, the arrays of a batch 25.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch

from amfm.data_pipeline.batch import Batch
from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.loader.reader_process import ReadingProcess
from amfm.data_pipeline.samples.packing import BufferPool, Row, assemble_rows
from amfm.data_pipeline.samples.samples import CorruptSample, SampleReader, SampleSettings
from amfm.data_pipeline.store.manifest import Part, Split
from amfm.data_pipeline.store.store import TokenStore

STATE_VERSION = 2
READ_AHEAD_BATCHES = 2
MAX_REQUESTS_PER_PROCESS = 64
PARTS_CHECKED_FIRST, PARTS_CHECKED_A_BATCH = 8192, 1024  # whether their files are there: some 4 microseconds each

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceUse:
    """Ledger line: what one source gave in one phase. epochs: passes over the source since the start of the run."""

    phase: int
    source: str
    samples: int
    tokens: int
    epochs: float


class PretrainLoader:
    """Delivers this rank's micro-batches of each global batch.

    A global batch is samples g, g + 1, ... in global order, cut into blocks of micro_batch_size samples; rank r of
    data_world_size takes the blocks j with j % data_world_size == r. So the set of micro-batches, and with it every
    loss that is computed a micro-batch, does not depend on the world size, which a stride of single samples would not
    give. The cursor counts delivered samples, not those read ahead. Every rank makes its own loader with the same
    arguments but data_rank; ranks never talk.

    Errors: ValueError when the store is not prepared, lacks a source, has no rows of this length, or a batch size
    does not divide; DamagedError (a RuntimeError) for a missing or damaged part unless data.on_corruption is quarantine.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        split: Split = "train",
        sequence_length: int,
        micro_batch_size: int,
        seed: int,
        data_rank: int = 0,
        data_world_size: int = 1,
    ) -> None:
        assert 0 <= data_rank < data_world_size, f"rank {data_rank} of {data_world_size}"
        self.config, self.micro_batch_size = config, micro_batch_size
        self.data_rank, self.data_world_size = data_rank, data_world_size
        self.settings = row_settings(config, split=split, sequence_length=sequence_length, seed=seed)
        self._unchecked: Iterator[Part] = iter(())
        self.reader = self._open_reader()
        self.store = self.reader.store
        self.global_sample = 0
        self.quarantined: list[CorruptSample] = []
        self.num_quarantined_at_load = 0
        self._pool = BufferPool()
        self._processes: list[ReadingProcess] = []
        self._requested: deque[tuple[int, ReadingProcess]] = deque()

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names that Batch.source_ids index."""
        return self.reader.source_names

    @property
    def sequence_length(self) -> int:
        """Tokens per sequence of the next global batch: a phase may change it."""
        return self.reader.sequence_length_at(self.global_sample)

    def take(self, global_batch_size: int, micro_batch_size: int | None = None) -> list[Batch]:
        """Read this rank's micro-batches of the next global batch; the cursor moves by the whole global batch.

        micro_batch_size: from now on; both sizes may change at any call. ValueError when rows of two lengths would
        meet in the batch.
        """
        self.micro_batch_size = micro_batch_size or self.micro_batch_size
        self._check_one_length(global_batch_size)
        self._check_files(PARTS_CHECKED_A_BATCH)
        blocks = self._blocks(self.global_sample, global_batch_size)
        batches = [self._make_batch(rows) for rows in self._read_blocks(blocks, global_batch_size)]
        self.global_sample += global_batch_size
        return batches

    def seek(self, global_sample: int) -> None:
        """Go to any global sample, as load_state_dict does."""
        self.global_sample = global_sample

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values, a few integers and identities; ranks differ only in what they quarantined."""
        return {
            "version": STATE_VERSION,
            "global_sample": self.global_sample,
            "seed": self.settings.seed,
            "split": self.settings.split,
            "packing": self.settings.packing,
            "shuffle": self.settings.shuffle,
            "dataset": self.store.identity(),
            "tokenizer": self.store.tokenizer_identity,
            "sources": {name: self.store.source_identity(name, self.settings.split) for name in self.source_names},
            "phases": [
                [phase.start_sample, dict(phase.weights), phase.sequence_length, *filter(None, [phase.skipped])]
                for phase in self.settings.phases
            ],
            **self._fim_state(),
            "ledger": [asdict(line) for line in self.ledger()],
            "quarantined": [[damage.sample, damage.part, damage.reason] for damage in self.quarantined],
        }

    def _fim_state(self) -> dict[str, Any]:
        """How sources are cut, where any is: earlier releases had none."""
        fim = self.settings.fim
        return {"fim": {name: [each.rate, each.kind, *each.tokens] for name, each in fim.items()}} if fim else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a state stands; any world size, micro-batch, global batch and worker count will do.

        ValueError naming both values when the tokenizer, seed, packing, shuffle, or anything that past samples came
        from is different. Sources and phases that begin after the state may be new.
        """
        mine = self.state_dict()
        remedies = {
            "version": "use the release that wrote the checkpoint, or start a new run from its weights",
            "tokenizer": "point data.store to the store that the run began with",
            "seed": "set train.seed back",
            "split": "load the state of the same split",
            "packing": "set data.packing back",
            "shuffle": "set data.shuffle back",
        }
        for name, remedy in remedies.items():
            if state[name] != mine[name]:
                raise ValueError(f"the data state has {name} {state[name]!r}, this run has {mine[name]!r}; {remedy}")
        cursor = int(state["global_sample"])
        self._check_past(state, mine, cursor)
        self.global_sample = cursor
        self.quarantined = [CorruptSample(*entry) for entry in state["quarantined"]]
        self.num_quarantined_at_load = len(self.quarantined)

    def _check_past(self, state: dict[str, Any], mine: dict[str, Any], cursor: int) -> None:
        """Compare phases and sources that decided samples before the cursor; what begins later may be new."""
        past = [phase for phase in state["phases"] if phase[0] == 0 or phase[0] < cursor]
        now = [phase for phase in mine["phases"] if phase[0] == 0 or phase[0] < cursor]
        lengths, lengths_now = [phase[2] for phase in past], [phase[2] for phase in now]
        if lengths != lengths_now and [phase[:2] for phase in past] == [phase[:2] for phase in now]:
            raise ValueError(
                f"the data state has sequence_length {_one_or_all(lengths)}, this run has {_one_or_all(lengths_now)}; "
                f"set it back, and change it by data.phases with start_sample {cursor} or later"
            )
        if past != now:
            raise ValueError(
                f"the data state was made with {in_words(past)} up to sample {cursor}, this run has {in_words(now)}; past "
                f"weights and samples left out cannot change: restore them and append the change to data.phases with start_sample {cursor} or later"
            )
        for source in sorted({name for phase in past for name in phase[1]}):
            before, after = (each.get("fim", {}).get(source) for each in (state, mine))
            if before != after:
                raise ValueError(
                    f"the data state was made with fim {before} of source {source!r}, this run has {after}; set "
                    "data.sources.*.fim back, or add the source under another name"
                )
            before, after = state["sources"].get(source), mine["sources"].get(source)
            if before != after and self.config.synthetic is not None:
                raise ValueError(
                    f"the data state has dataset {before}, data.synthetic has {after}; set data.synthetic back, or start a new "
                    "run"
                )
            if before != after:
                raise ValueError(
                    f"the data state has dataset {state['dataset']} (source {source!r}: {before}), the store "
                    f"{self.config.store} has {mine['dataset']} ({after}); point data.store to the store that the run "
                    "began with, or start a new run"
                )

    def ledger(self, global_sample: int | None = None) -> list[SourceUse]:
        """Compute samples, tokens and epochs that each source gives in each phase up to a global sample (the cursor).

        Exact after any resume, because computed from the number and not counted.
        """
        stop = self.global_sample if global_sample is None else global_sample
        lines: list[SourceUse] = []
        drawn = Counter[str]()
        for number, taken in enumerate(self.reader.mixture.draws_before(stop)):
            for source, samples in taken.items():
                drawn[source] += samples
                epochs = self.reader.epochs_after(source, drawn[source])
                tokens = samples * self.settings.phases[number].sequence_length
                lines.append(SourceUse(number, source, samples, tokens, epochs))
        return lines

    def describe_repeats(self, num_samples: int) -> list[str]:
        """Describe what a run of `num_samples` samples sees again, one line each.

        That is sources of more than one epoch, and epochs that a change of the sequence length leaves unfinished.
        """
        ledger = self.ledger(num_samples)
        epochs = {line.source: line.epochs for line in ledger}
        drawn = Counter[str]()
        for line in ledger:
            drawn[line.source] += line.samples
        repeated = [
            f"source {source!r} gives {passes:.2f} epochs in the {num_samples} samples of this run"
            for source, passes in sorted(epochs.items())
            if passes > 1
        ]
        return repeated + [
            f"source {source!r}: sequences of {stretch.sequence_length} tokens begin epoch {stretch.first_epoch} when "
            f"{stretch.repeats:.1%} of the epoch before was given; that much is seen again"
            for source in self.source_names
            for stretch in self.reader.stretches(source)
            if stretch.repeats and stretch.first_draw < drawn[source]
        ]

    def close(self) -> None:
        """End the reading processes and close the store; take() starts them again."""
        for process in self._processes:
            process.close()
        self._processes.clear()
        self._requested.clear()
        self.store.close()

    def _open_reader(self) -> SampleReader:
        if self.config.synthetic is not None:
            return self.settings.open_reader()
        store = TokenStore.open(self.settings.store, self.settings.cache)
        if self.data_rank == 0 and self.settings.on_corruption == "raise":
            # Now, and not at the step that reads the missing part; a huge store is checked in a stretch a batch.
            self._unchecked = store.check_files()
            self._check_files(PARTS_CHECKED_FIRST)
        return SampleReader(self.settings, store)

    def _check_files(self, num_parts: int) -> None:
        """Check the next parts' files; DamagedError for a missing one, long before a row of it is due."""
        for _ in islice(self._unchecked, num_parts):
            pass

    def _check_one_length(self, global_batch_size: int) -> None:
        """Raise ValueError if a phase with another sequence length begins inside the next global batch."""
        first, stop = self.global_sample, self.global_sample + global_batch_size
        for phase in self.settings.phases:
            if first < phase.start_sample < stop and phase.sequence_length != self.sequence_length:
                raise ValueError(
                    f"data.phases: sequences of {phase.sequence_length} tokens start at sample {phase.start_sample}, inside "
                    f"the global batch of samples {first} to {stop - 1}; use start_sample {stop}"
                )

    @property
    def _stride(self) -> int:
        """Samples from one micro-batch of this rank to its next."""
        return self.micro_batch_size * self.data_world_size

    def _blocks(self, first_sample: int, global_batch_size: int) -> list[int]:
        """First samples of this rank's micro-batches."""
        divisor = self._stride
        if global_batch_size % divisor:
            raise ValueError(
                f"train.global_batch_size={global_batch_size} must be a multiple of micro_batch_size "
                f"{self.micro_batch_size} x {self.data_world_size} data ranks = {divisor}; use "
                f"{max(1, round(global_batch_size / divisor)) * divisor}"
            )
        count = global_batch_size // self.micro_batch_size
        return [first_sample + j * self.micro_batch_size for j in range(self.data_rank, count, self.data_world_size)]

    def _read_blocks(self, blocks: list[int], global_batch_size: int) -> Iterator[list[Row]]:
        """Rows of each block, one block at a time, so that their memory is used again while the cache holds it."""
        if not self.config.num_workers:
            for first in blocks:
                yield self._note(*self.reader.read_block(first, self.micro_batch_size, self._stride))
            return
        upcoming = list(blocks)
        # Asked for as if the batch size stayed; where it changes, `_request` finds that what is due differs.
        for ahead in range(1, READ_AHEAD_BATCHES + 1):
            upcoming += self._blocks(self.global_sample + ahead * global_batch_size, global_batch_size)
        self._request(upcoming)
        for number, first in enumerate(blocks):
            requested, process = self._requested.popleft()
            assert requested == first, f"rows of sample {requested} came where {first} was due"
            rows = self._note(*process.receive())
            self._request(upcoming[number + 1 :])
            yield rows

    def _request(self, upcoming: list[int]) -> None:
        """Have the reading processes work on these blocks, in this order."""
        if not self._processes:
            self._processes = [ReadingProcess(self.settings) for _ in range(self.config.num_workers)]
        if [first for first, _ in self._requested] != upcoming[: len(self._requested)]:
            for _, process in self._requested:  # after a seek or with another batch size: what was asked for is stale
                process.receive()
            self._requested.clear()
        # In turn over the processes, so that answers come in order; each knows the stride to its own next block.
        limit = MAX_REQUESTS_PER_PROCESS * len(self._processes)
        for first in upcoming[len(self._requested) : limit]:
            last = self._processes.index(self._requested[-1][1]) if self._requested else -1
            process = self._processes[(last + 1) % len(self._processes)]
            process.request(first, self.micro_batch_size, self._stride * len(self._processes))
            self._requested.append((first, process))

    def _note(self, rows: list[Row], damages: list[CorruptSample]) -> list[Row]:
        """Log and keep the samples that were skipped, which the state carries on; passes the rows through."""
        for damage in damages:
            logger.warning("sample %d skipped: %s", damage.sample, damage.reason)
            if damage not in self.quarantined:  # a validation reads the same rows each time
                self.quarantined.append(damage)
        return rows

    def _make_batch(self, rows: list[Row]) -> Batch:
        """Assemble rows into a batch of tensors over memory of the pool, which comes back when the last of them dies."""
        is_padded = self.config.packing == "best_fit" or any(row.num_valid < len(row.tokens) - 1 for row in rows)
        return batch_of_rows(rows, self.config.mask_document_boundaries, is_padded=is_padded, pool=self._pool)


def batch_of_rows(
    rows: Sequence[Row],
    mask_document_boundaries: bool = True,
    *,
    is_padded: bool = True,
    pool: BufferPool | None = None,
) -> Batch:
    """Assemble rows of equal length into a batch; is_padded: whether routers must know where padding is."""
    arrays = assemble_rows(rows, mask_document_boundaries=mask_document_boundaries, pool=pool)
    length = arrays.tokens.shape[1]
    return Batch(
        tokens_BT=torch.from_numpy(arrays.tokens),
        labels_BT=torch.from_numpy(arrays.labels),
        loss_mask_BT=torch.from_numpy(arrays.loss_mask),
        positions_BT=torch.from_numpy(arrays.positions),
        document_ids_BT=torch.from_numpy(arrays.document_ids),
        cu_seqlens=torch.from_numpy(arrays.cu_seqlens),
        sample_ids=tuple(row.sample for row in rows),
        source_ids=tuple(row.source for row in rows),
        lengths_B=torch.tensor([min(row.num_valid, length) for row in rows]) if is_padded else None,
    )


def row_settings(config: DataConfig, *, split: Split, sequence_length: int, seed: int) -> SampleSettings:
    """Derive the settings that decide the rows, of text or of a synthetic task; errors as those of the two."""
    kind: type[SampleSettings] = SampleSettings if config.synthetic is None else config.synthetic.load("rows")
    return kind.from_config(config, split=split, sequence_length=sequence_length, seed=seed)


def in_words(phases: Sequence[Any]) -> str:
    """Weights of phases as text: those of the first, and from which sample others count."""
    texts = [
        f"{'' if start == 0 else f'from sample {start} '}{', '.join(f'{name} {weight:g}' for name, weight in weights.items())}"
        f" in sequences of {length}{''.join(f', without {number} samples' for number in skipped)}"
        for start, weights, length, *skipped in phases
    ]
    return f"the weights {'; '.join(texts)}"


def _one_or_all(lengths: list[int]) -> int | list[int]:
    return lengths[0] if len(lengths) == 1 else lengths
