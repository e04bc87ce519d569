"""From document ends to rows: windows of the joined documents, best-fit bins, and the labels and masks of a row.

Two ways to cut a part into sequences of T tokens. Windows cut the joined documents every T tokens: no padding, and documents are
split wherever a row ends. Best-fit bins put whole documents together: some padding, and only documents longer than a row are
split. Either way a row has one token more than T, the label of its last.

`assemble_rows` is the one place where labels, loss mask, positions, document ids and cu_seqlens are made. It runs in the
training process for every micro-batch, hence numpy on whole batches and no loop over tokens or documents.

Memory for micro-batches that comes back: to map and clear fresh pages costs more than to fill them with tokens.

numpy keeps the owner of an array's memory alive as its base, and torch.from_numpy keeps the array. So a lent block is known
to be free when the object that all of them hold, `_Loan`, dies; no one has to give anything back, and a batch that
someone keeps is never overwritten.

Which tokens of a part are learned, as runs: first and stop of each, one after another, rising.

A label counts where its own token is inside of a run: so the first token that is learned is predicted by the one before it.

Best-fit bins of a part for one sequence length are computed once, kept next to the parts, and found again by digest.

Bins never cross parts, so a part's bins depend only on the part and the sequence length and are named by its digest: adding a
source recomputes nothing, and a part that was rewritten is never read with bins of the old one. Counts of a whole
source have a separate file, because a start of training needs the number of rows and not the bins.
"""

from __future__ import annotations

import io
import json
import weakref
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from amfm.data_pipeline.durable.files import write_file_atomically
from amfm.data_pipeline.store.manifest import Part, Split
from amfm.data_pipeline.store.store import TokenStore

Bytes = npt.NDArray[np.uint8]


class _Loan:
    """Owner that every array over a lent block keeps alive; it dies with the last of them."""

    def __init__(self, block: Bytes) -> None:
        self.block = block
        self.__array_interface__ = block.__array_interface__


class BufferPool:
    """Lends blocks of bytes; a block is free again when no array or tensor looks at its memory any more."""

    MAX_FREE_BYTES = 2**28  # here, since the last loans die while an interpreter ends, when names of a file are gone

    def __init__(self) -> None:
        self._free: list[Bytes] = []
        self._lent: dict[int, weakref.ref[_Loan]] = {}

    def lend(self, num_bytes: int) -> Bytes:
        """Lend a block of num_bytes with unspecified contents, a free one of that size if there is any."""
        block = self._free.pop() if self._free else np.empty(num_bytes, np.uint8)
        if len(block) != num_bytes:  # another batch size: its blocks would not fit, so start over
            self._free.clear()
            block = np.empty(num_bytes, np.uint8)
        loan = _Loan(block)
        self._lent[id(block)] = weakref.ref(loan, partial(self._take_back, block))
        return np.asarray(loan)

    def _take_back(self, block: Bytes, _: weakref.ref[_Loan]) -> None:
        """Make a block free again, within `MAX_FREE_BYTES`; called when its loan dies."""
        del self._lent[id(block)]
        if (len(self._free) + 1) * len(block) <= self.MAX_FREE_BYTES:
            self._free.append(block)


IGNORED_LABEL = -100

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


class Row(NamedTuple):
    """One row before batching.

    tokens: sequence_length + 1 token ids; the last is only ever a label. starts: where documents begin in
    the tokens, 0 included; the entry sequence_length says that the extra token belongs to the next document.
    num_valid: tokens before the padding; sequence_length + 1 when the extra token is real. sample: global sample number. source: index of the source.
    labels: none where they are the tokens that follow; else sequence_length labels, -100 if none counts.
    """

    tokens: npt.NDArray[np.generic]
    starts: Int32
    num_valid: int
    sample: int
    source: int
    labels: Int64 | None = None


@dataclass(frozen=True)
class RowArrays:
    """The arrays of a micro-batch, [B, T] each, cu_seqlens [documents + 1]; the meaning is that of `Batch`."""

    tokens: Int64
    labels: Int64
    loss_mask: npt.NDArray[np.bool_]
    positions: Int32
    document_ids: Int32
    cu_seqlens: Int32


def count_windows(num_tokens: int, sequence_length: int) -> int:
    """Count whole windows of sequence_length + 1 tokens, each beginning with the last label of the one before."""
    return max(0, (num_tokens - 1) // sequence_length)


def starts_in_window(document_ends: Int64, first: int, length: int) -> Int32:
    """Find where documents begin in tokens [first, first + length), relative to first; 0 is always there.

    document_ends: offset after each document of the part, rising.
    """
    ends = document_ends.data  # bisecting a view takes half the time of two calls into numpy
    low = bisect_right(ends, first)
    high = bisect_left(ends, first + length, low)
    starts = np.empty(1 + high - low, np.int32)
    starts[0] = 0
    np.subtract(document_ends[low:high], first, out=starts[1:], casting="same_kind")
    return starts


def assemble_rows(rows: Sequence[Row], *, mask_document_boundaries: bool, pool: BufferPool | None = None) -> RowArrays:
    """Build a micro-batch from rows of equal length, in memory of the pool if one is given.

    Labels are the tokens shifted by one inside the window, where a row brings none. With mask_document_boundaries the label of a document's
    last token is masked, positions restart and ids rise at each start; without, a row is one document (plain
    concatenation) except for its padding. Padding never has labels.
    """
    num_rows, length = len(rows), len(rows[0].tokens) - 1
    out = _allocate(num_rows, length, pool or BufferPool())
    out.loss_mask.fill(True)
    row_starts = []
    for number, row in enumerate(rows):
        np.copyto(out.tokens[number], row.tokens[:-1])
        np.copyto(out.labels[number], row.tokens[1:] if row.labels is None else row.labels)
        if row.labels is not None:
            np.not_equal(row.labels, IGNORED_LABEL, out=out.loss_mask[number])
        starts = row.starts if mask_document_boundaries else row.starts[:1]
        if row.num_valid < length:
            starts = np.append(starts, np.int32(row.num_valid))
        elif starts[-1] == length:
            starts = starts[:-1]
            _mask(out, number, slice(length - 1, None))
        if row.num_valid <= length:
            _mask(out, number, slice(row.num_valid - 1, None))
        row_starts.append(starts)
    return _number_documents(out, row_starts)


def _mask(out: RowArrays, row: int, places: slice) -> None:
    """Mask the labels at these places, in both arrays that say so."""
    out.labels[row, places] = IGNORED_LABEL
    out.loss_mask[row, places] = False


def _allocate(num_rows: int, length: int, pool: BufferPool) -> RowArrays:
    """Arrays of a micro-batch in one block of memory: 8 + 8 + 4 + 4 + 1 bytes per token, the widest first to stay
    aligned.
    """
    places = num_rows * length
    block = pool.lend(25 * places)
    tokens, labels = block[: 16 * places].view(np.int64).reshape(2, num_rows, length)
    positions, document_ids = block[16 * places : 24 * places].view(np.int32).reshape(2, num_rows, length)
    loss_mask = block[24 * places :].view(np.bool_).reshape(num_rows, length)
    return RowArrays(tokens, labels, loss_mask, positions, document_ids, np.empty(0, np.int32))


def _number_documents(out: RowArrays, row_starts: Sequence[Int32]) -> RowArrays:
    """Fill positions and ids, mask the label of every token before a start, and add cu_seqlens."""
    num_rows, length = out.tokens.shape
    counts = [len(starts) for starts in row_starts]
    starts = np.concatenate(row_starts)
    # Place of the token before each start in the flattened batch; a row's own start (0) has none to mask.
    before = starts + np.repeat(np.arange(-1, num_rows * length - 1, length, dtype=np.int32), counts)
    last_tokens = before[starts.nonzero()]
    out.labels.reshape(-1)[last_tokens] = IGNORED_LABEL
    out.loss_mask.reshape(-1)[last_tokens] = False
    cu_seqlens = np.empty(len(starts) + 1, np.int32)
    np.add(before, 1, out=cu_seqlens[:-1])
    cu_seqlens[-1] = num_rows * length
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    np.subtract(_count_up(num_rows * length), np.repeat(cu_seqlens[:-1], lengths), out=out.positions.reshape(-1))
    first_of_row = np.array([0, *accumulate(counts)][:-1], dtype=np.int32)
    numbers = _count_up(num_rows * length)[: len(starts)] - np.repeat(first_of_row, counts)
    np.copyto(out.document_ids.reshape(-1), np.repeat(numbers, lengths))
    return replace(out, cu_seqlens=cu_seqlens)


@lru_cache(maxsize=4)
def _count_up(stop: int) -> Int32:
    return np.arange(stop, dtype=np.int32)


@dataclass(frozen=True)
class Bins:
    """Documents fitted whole into rows.

    first, length: place of each piece in the part's tokens, in the order of the bins. bin_offsets: pieces of bin b
    are bin_offsets[b] to bin_offsets[b + 1].
    """

    first: Int64
    length: Int64
    bin_offsets: Int64

    @property
    def num_bins(self) -> int:
        """Rows that the part gives."""
        return len(self.bin_offsets) - 1


def fit_documents(document_ends: npt.NDArray[np.integer], capacity: int) -> Bins:
    """Best-fit-decreasing of a part's documents into rows of `capacity` tokens.

    Longer documents are cut into full rows and a rest. Each piece goes to the most loaded row that still holds it (Ding
    et al. 2024, arXiv 2404.10830, section 3): free space is found in a bit set, so the cost is near-linear.
    Empty part: no bins.
    """
    ends = document_ends.astype(np.int64)
    begins = np.concatenate((np.zeros(1, np.int64), ends[:-1]))
    first, length = _cut_long(begins, ends - begins, capacity)
    order = np.argsort(-length, kind="stable")
    bins: list[list[int]] = []
    open_by_space: dict[int, list[int]] = {}
    spaces = 0  # bit s is set when some row has exactly s free tokens
    for piece in order.tolist():
        size = int(length[piece])
        candidates = spaces >> size
        if candidates:
            # The lowest set bit is the least free space that suffices: the most loaded row.
            space = size + (candidates & -candidates).bit_length() - 1
            chosen = open_by_space[space].pop()
            if not open_by_space[space]:
                spaces &= ~(1 << space)
            bins[chosen].append(piece)
        else:
            space, chosen = capacity, len(bins)
            bins.append([piece])
        if space - size:
            open_by_space.setdefault(space - size, []).append(chosen)
            spaces |= 1 << (space - size)
    flat = np.array([piece for pieces in bins for piece in pieces], dtype=np.int64)
    offsets = np.cumsum([0] + [len(pieces) for pieces in bins], dtype=np.int64)
    return Bins(first[flat], length[flat], offsets)


def _cut_long(begins: Int64, lengths: Int64, capacity: int) -> tuple[Int64, Int64]:
    """Cut documents into pieces of at most `capacity` tokens: first token and length of each; empty documents vanish."""
    begins, lengths = begins[lengths > 0], lengths[lengths > 0]
    pieces = -(-lengths // capacity)
    number = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    first = np.repeat(begins, pieces) + number * capacity
    return first, np.minimum(capacity, np.repeat(begins + lengths, pieces) - first)


def find_runs(counted: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint64]:
    """Find the runs of true values: uint64 [2 x runs]."""
    edges = np.diff(counted.astype(np.int8), prepend=0, append=0)
    return np.flatnonzero(edges).astype(np.uint64)


def is_counted(spans: Int64, first: int, length: int) -> npt.NDArray[np.bool_]:
    """Whether each of the tokens [first, first + length) is inside of a run."""
    low, high = np.searchsorted(spans, (first, first + length), side="right")
    changes = np.zeros(length + 1, np.int64)
    changes[0] = low
    changes[spans[low:high] - first] += 1
    return np.cumsum(changes)[:length] % 2 == 1


def label_counted(tokens: npt.NDArray[np.generic], pieces: Sequence[npt.NDArray[np.bool_]]) -> Int64:
    """Labels of a row of tokens, of which the first have these values of `is_counted` piece by piece, and the rest counts not."""
    counted = np.zeros(len(tokens), np.bool_)
    known = np.concatenate(pieces)
    counted[: len(known)] = known
    return np.where(counted[1:], tokens[1:].astype(np.int64), IGNORED_LABEL)


def describe_disorder(spans: Int64, num_tokens: int) -> str | None:
    """Why these cannot be runs of a part of so many tokens; None where they can."""
    if not len(spans) or len(spans) % 2:
        return f"{len(spans)} edges do not make runs"
    if spans[0] < 0 or spans[-1] > num_tokens or (np.diff(spans) <= 0).any():
        return "its runs of tokens to learn do not rise within it"
    return None


MAX_LOADED = 64
DIGEST_BYTES = 16  # BLAKE3 of the content, at the end of each file


class BinIndex:
    """Bins of the parts of a store for rows of `capacity` tokens.

    Files in store/bins/CAPACITY are a cache: a pure function of the parts, each with a digest at its end, rewritten when
    missing or damaged, and not written at all when the store is read-only.
    """

    def __init__(self, store: TokenStore, capacity: int) -> None:
        self.store, self.capacity = store, capacity
        self._folder = store.path / "bins" / str(capacity)
        self._loaded: OrderedDict[str, Bins] = OrderedDict()

    def count(self, source: str, split: Split) -> list[int]:
        """Count the rows of each part of a source, in order; the first call for a store fits all its documents."""
        name = f"{source}-{split}-{self.store.source_identity(source, split)}.json"
        found = self._find(name)
        if found is not None:
            return [int(count) for count in json.loads(found)]
        counts = [self.load(part).num_bins for part in self.store.parts(source, split)]
        self._keep(name, json.dumps(counts).encode())
        return counts

    def load(self, part: Part) -> Bins:
        """Load the bins of a part, from memory (the 64 used last), from the file, or by fitting its documents."""
        if part.path in self._loaded:
            self._loaded.move_to_end(part.path)
            return self._loaded[part.path]
        name = f"{part.digest}.npz"
        found = self._find(name)
        if found is not None:
            with np.load(io.BytesIO(found), allow_pickle=False) as arrays:
                bins = Bins(arrays["first"], arrays["length"], arrays["bin_offsets"])
        else:
            bins = fit_documents(self.store.document_ends(part), self.capacity)
            content = io.BytesIO()
            np.savez(content, first=bins.first, length=bins.length, bin_offsets=bins.bin_offsets)
            self._keep(name, content.getvalue())
        self._loaded[part.path] = bins
        if len(self._loaded) > MAX_LOADED:
            self._loaded.popitem(last=False)
        return bins

    def _find(self, name: str) -> bytes | None:
        """Content of a file of the cache; None where it is absent or damaged, and then it is computed and rewritten."""
        try:
            held = (self._folder / name).read_bytes()
        except OSError:
            return None
        content, digest = held[:-DIGEST_BYTES], held[-DIGEST_BYTES:]
        return content if blake3(content).digest(DIGEST_BYTES) == digest else None

    def _keep(self, name: str, content: bytes) -> None:
        """Write a file of the cache, atomically: ranks that fit the same part at once write the same bytes."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_file_atomically(self._folder / name, content + blake3(content).digest(DIGEST_BYTES))
        except OSError:
            return  # a read-only or full disk only costs computing the bins again in the next process
