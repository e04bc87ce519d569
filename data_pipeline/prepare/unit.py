"""What one actor does: read segments, tokenize, shuffle the documents, write the parts. No Ray in here.

A unit is a function of its inputs and settings: the split of a document follows from its content, the order inside a part
from a keyed permutation, and no clock, process or neighbour has a say. So a unit that failed is done again anywhere, and the
bytes of a store do not depend on how it was made. Documents are tokenized in batches, which is what the libraries are fast
at, and kept as views of one array a batch until a part is full.
"""

from __future__ import annotations

import errno
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from amfm.data_pipeline.prepare.documents import SegmentReader
from amfm.data_pipeline.prepare.duplicates import hash_text, load_skips, write_hashes
from amfm.data_pipeline.prepare.plan import Unit
from amfm.data_pipeline.prepare.reading import make_filter
from amfm.data_pipeline.prepare.records import Document, Reject, TokenDocument
from amfm.data_pipeline.prepare.rejects import RejectList, listing_rejects
from amfm.data_pipeline.samples.packing import find_runs
from amfm.data_pipeline.samples.permutation import derive_key, permute
from amfm.data_pipeline.store.manifest import SPLITS, Part, Split
from amfm.data_pipeline.store.part_writer import write_part
from amfm.data_pipeline.tokenizer.chat_template import NOTHING_LEARNED
from amfm.data_pipeline.tokenizer.tokenizer import Tokenizer, require_marking

BATCH_DOCUMENTS = 512
BATCH_CHARACTERS = 2_000_000
SPLIT_LENGTH = 1024  # characters or tokens that decide a document's split together with its size
BYTES_A_DOCUMENT = 16  # of text, at the least, by which tiny documents count: each takes 200 bytes of memory
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class UnitReport:
    """What a unit did; small enough to be a line of the journal.

    seconds, cpu_seconds: what it took, on the clock and of the process that did it.
    """

    parts: dict[Split, list[Part]]
    documents: int
    text_bytes: int
    tokens: int
    rejects: int
    covered_bytes: int
    seconds: float = 0.0
    cpu_seconds: float = 0.0


@dataclass(frozen=True)
class UnitFailure:
    """Why a unit cannot be written now; the disk's error, not a bug."""

    reason: Literal["disk_full", "disk_error"]
    message: str


@dataclass
class _Collected:
    """Tokens of one split since the last part; counted: which of them are learned, of a source that says so."""

    pieces: list[npt.NDArray[np.generic]] = field(default_factory=list)
    counted: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    text_bytes: int = 0


def run_unit(unit: Unit, store: Path, tokenizer: Tokenizer) -> UnitReport | UnitFailure:
    """Write the parts of a unit and its rejects, or the hashes of its documents; the bytes depend only on the unit.

    Errors of the disk come back as UnitFailure, so that the caller can stop in order; others are raised.
    """
    began, cpu_began = time.monotonic(), time.process_time()
    try:
        report = _hash_unit(unit, store) if unit.stage == "hash" else _write_unit(unit, store, tokenizer)
        return replace(report, seconds=time.monotonic() - began, cpu_seconds=time.process_time() - cpu_began)
    except OSError as error:
        reason: Literal["disk_full", "disk_error"] = "disk_full" if error.errno in DISK_FULL else "disk_error"
        return UnitFailure(reason, f"{error.strerror or error} ({error.filename or store})")


def _hash_unit(unit: Unit, store: Path) -> UnitReport:
    """Hash the documents that pass the filters, in the order in which writing meets them, and keep the hashes."""
    reason_to_drop = make_filter(unit.settings.filters, unit.source)
    digests: list[bytes] = []
    text_bytes = 0
    for segment in unit.segments:
        settings = unit.settings
        reader = SegmentReader(
            segment, settings.text_column, reason_to_drop, dialogues=settings.dialogues, reading=settings.reading
        )
        for item in reader:
            if isinstance(item, Document):
                digests.append(hash_text(item.text.encode()))
                text_bytes += item.num_bytes
    write_hashes(store, unit, digests)
    return UnitReport({split: [] for split in SPLITS}, len(digests), text_bytes, tokens=0, rejects=0, covered_bytes=0)


def _write_unit(unit: Unit, store: Path, tokenizer: Tokenizer) -> UnitReport:
    """Write the parts of a unit, then its rejects."""
    with listing_rejects(store, unit) as rejects:
        return _UnitWriter(unit, store, tokenizer, rejects).run()


class _UnitWriter:
    """Writes one unit: what was collected since the last part, parts written, rejects, and bytes of jsonl covered."""

    def __init__(self, unit: Unit, store: Path, tokenizer: Tokenizer, rejects: RejectList) -> None:
        self.unit, self.store, self.tokenizer, self.rejects = unit, store, tokenizer, rejects
        self.collected: dict[Split, _Collected] = {split: _Collected() for split in SPLITS}
        self.parts: dict[Split, list[Part]] = {split: [] for split in SPLITS}
        self.covered_bytes = 0
        self.knows_text = True  # false where documents come as tokens: their bytes are not text
        self.split_key = derive_key(unit.settings.seed, "validation")
        self.reason_to_drop = make_filter(unit.settings.filters, unit.source)
        self.skips, self.places = load_skips(store, unit), 0

    def run(self) -> UnitReport:
        for batch in self._batches():
            self._tokenize(batch)
            self._write_full_parts()
        for split in SPLITS:
            if self.collected[split].pieces:
                self._write(split)
        parts = [part for split in SPLITS for part in self.parts[split]]
        return UnitReport(
            parts=self.parts,
            documents=sum(part.num_documents for part in parts),
            text_bytes=sum(part.text_bytes for part in parts),
            tokens=sum(part.num_tokens for part in parts),
            rejects=self.rejects.number,
            covered_bytes=self.covered_bytes,
        )

    def _batches(self) -> Iterator[list[tuple[Split, Document]]]:
        """Gather texts into batches for the tokenizer, bounded in number and in characters."""
        batch: list[tuple[Split, Document]] = []
        characters = 0
        for split, document in self._documents():
            batch.append((split, document))
            characters += len(document.text)
            if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch

    def _documents(self) -> Iterator[tuple[Split, Document]]:
        """Texts to tokenize; documents that are tokens already are collected on the way."""
        settings = self.unit.settings
        for segment in self.unit.segments:
            reader = SegmentReader(
                segment,
                settings.text_column,
                self.reason_to_drop,
                settings.eos_id,
                settings.dialogues,
                settings.reading,
            )
            for item in reader:
                if isinstance(item, Reject):
                    self.rejects.append(item)
                elif isinstance(item, TokenDocument):
                    self._collect_ids(item.tokens, segment.split)
                    self._write_full_parts()
                elif self._is_duplicate():
                    self.rejects.append(Reject(item.position, "filter: the text came before, exact_duplicates=drop"))
                else:
                    split = segment.split or self._split_of(item.text[:SPLIT_LENGTH].encode(), item.num_bytes)
                    yield split, item
            self.covered_bytes += reader.covered_bytes

    def _is_duplicate(self) -> bool:
        """Whether the next document is on the list of copies; must be asked once per document, in order."""
        self.places += 1
        return self.places - 1 in self.skips

    def _split_of(self, beginning: bytes, num_bytes: int) -> Split:
        """Decide the split by content, so that copies of a text never sit on both sides.

        Its beginning and size are enough for that: copies agree in both.
        """
        if self.unit.settings.validation_fraction == 0:
            return "train"
        digest = hashlib.blake2b(beginning, digest_size=8, key=self.split_key)
        digest.update(num_bytes.to_bytes(8, "little"))
        drawn = int.from_bytes(digest.digest(), "little")
        return "validation" if drawn < self.unit.settings.validation_fraction * 2**64 else "train"

    def _tokenize(self, batch: list[tuple[Split, Document]]) -> None:
        if self.unit.settings.dialogues is not None:
            for split, document in batch:
                self._collect_counted(split, document)
            return
        ids, ends = self.tokenizer.encode_documents([document.text for _, document in batch])
        self._collect([split for split, _ in batch], ids, ends, [document.num_bytes for _, document in batch])

    def _collect_counted(self, split: Split, document: Document) -> None:
        """Keep a document of which a part is learned, and its end token with it where its last token is."""
        dialogues = self.unit.settings.dialogues
        assert dialogues is not None and document.spans is not None, "a source of dialogues has spans"
        ids, counted = require_marking(self.tokenizer, "a dialogue").encode_spans(
            document.text, document.spans, has_control_tokens=dialogues.template is not None
        )
        if not any(counted):
            self.rejects.append(Reject(document.position, f"no token begins in what counts: {NOTHING_LEARNED}"))
            return
        if ids[-1] != self.unit.settings.eos_id:
            ids, counted = [*ids, self.unit.settings.eos_id], [*counted, counted[-1]]
        self._collect([split], np.array(ids), np.array([len(ids)]), [document.num_bytes])
        self.collected[split].counted.append(np.array(counted))

    def _collect_ids(self, ids: npt.NDArray[np.signedinteger], planned: Split | None) -> None:
        """Keep a document that came as tokens; planned: its split, where the plan decided it."""
        self.knows_text = False
        split = planned or self._split_of(ids[:SPLIT_LENGTH].tobytes(), ids.nbytes)
        end = self.unit.settings.eos_id
        ended = ids if ids[-1] == end else np.append(ids, np.array(end, ids.dtype))  # another type would widen the ids
        self._collect([split], ended, np.array([len(ended)]), [ids.nbytes])

    def _collect(
        self,
        splits: Sequence[Split],
        ids: npt.NDArray[np.signedinteger],
        ends: npt.NDArray[np.int64],
        text_bytes: Sequence[int],
    ) -> None:
        """Keep documents, which are one after another in `ids`, as views of one array of the store's dtype."""
        settings = self.unit.settings
        if ids.view(f"u{ids.itemsize}").max() >= settings.vocab_size:  # negative ids are the largest unsigned ones
            smallest, largest = int(ids.min()), int(ids.max())
            raise ValueError(
                f"source {self.unit.source!r} has token id {largest if smallest >= 0 else smallest}, but the "
                f"vocabulary is {settings.vocab_size} and the store holds {settings.layout.dtype}; give the tokenizer of these "
                "tokens, or without one a model.vocab_size above it"
            )
        tokens, start = ids.astype(settings.layout.dtype), 0
        for split, stop, num_bytes in zip(splits, ends.tolist(), text_bytes):
            collected = self.collected[split]
            collected.pieces.append(tokens[start:stop])
            collected.text_bytes += num_bytes
            start = stop

    def _write_full_parts(self) -> None:
        """Write a split that has grown to twice the part size, in text or in what memory tiny documents take.

        Text may be far larger than the plan's estimate.
        """
        for split in SPLITS:
            collected, part_bytes = self.collected[split], self.unit.settings.part_bytes
            if max(collected.text_bytes, BYTES_A_DOCUMENT * len(collected.pieces)) >= 2 * part_bytes:
                self._write(split)

    def _write(self, split: Split) -> None:
        """Shuffle the collected documents of a split and write them as the unit's next part."""
        unit, collected = self.unit, self.collected[split]
        number = len(self.parts[split])
        # Windows join neighbouring documents of a part: shuffled, or a row would hold one file's neighbours.
        key = derive_key(unit.settings.seed, "documents", unit.name, split, number)
        order = permute(range(len(collected.pieces)), len(collected.pieces), key).tolist()
        pieces = [collected.pieces[index] for index in order]
        counted = [collected.counted[index] for index in order] if collected.counted else None
        part = write_part(
            self.store,
            f"parts/{unit.source}/{split}-{unit.number:06d}-{number:02d}.zarr",
            np.concatenate(pieces),
            np.cumsum([len(piece) for piece in pieces], dtype=np.uint64),
            text_bytes=collected.text_bytes if self.knows_text else 0,
            layout=unit.settings.layout,
            attributes=self._attributes(split),
            loss_spans=None if counted is None else find_runs(np.concatenate(counted)),
        )
        self.parts[split].append(part)
        self.collected[split] = _Collected()

    def _attributes(self, split: Split) -> dict[str, Any]:
        """Attributes of a part's Zarr group: where its tokens come from, for whoever finds it without a manifest."""
        settings = self.unit.settings
        return {
            "format": "amfm token part",
            "version": 2,
            "source": self.unit.source,
            "split": split,
            "tokenizer_identity": settings.tokenizer_identity,
            "vocab_size": settings.vocab_size,
            "eos_id": settings.eos_id,
            "inputs": [[item.file.name, item.start, item.stop] for item in self.unit.segments],
        }
