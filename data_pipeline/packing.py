"""From document ends to rows: windows of the joined documents, best-fit bins, and the labels and masks of a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IGNORED_LABEL = -100

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """One row before batching.

    tokens: sequence_length + 1 token ids; the last is only ever a label. starts: where documents begin in
    the tokens, 0 included; the entry sequence_length says that the extra token belongs to the next document.
    num_valid: tokens before the padding; sequence_length + 1 when the extra token is real. sample: global sample number. source: index of the source.
    """

    tokens: npt.NDArray[np.generic]
    starts: Int32
    num_valid: int
    sample: int
    source: int


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
    """Whole windows of sequence_length + 1 tokens, each beginning where the labels of the last one ended."""
    return max(0, (num_tokens - 1) // sequence_length)


def starts_in_window(document_ends: Int64, first: int, length: int) -> Int32:
    """Where documents begin in tokens [first, first + length), relative to first; 0 is always there."""
    low = int(document_ends.searchsorted(first, side="right"))
    high = int(document_ends.searchsorted(first + length, side="left"))
    starts = np.zeros(1 + high - low, np.int32)
    starts[1:] = document_ends[low:high] - first
    return starts


def assemble_rows(rows: Sequence[Row], *, mask_document_boundaries: bool) -> RowArrays:
    """Build a micro-batch from rows of equal length.

    Labels are the tokens shifted by one inside the window. With mask_document_boundaries the label of a document's
    last token is masked, positions restart and ids rise at each start; without, a row is one document (plain
    concatenation) except for its padding. Padding never has labels.
    """
    num_rows, sequence_length = len(rows), len(rows[0].tokens) - 1
    tokens = np.empty((num_rows, sequence_length), dtype=np.int64)
    labels = np.empty((num_rows, sequence_length), dtype=np.int64)
    row_starts: list[Int32] = []
    masked: list[Int32] = []
    for number, row in enumerate(rows):
        tokens[number], labels[number] = row.tokens[:-1], row.tokens[1:]
        starts = row.starts if mask_document_boundaries else row.starts[:1]
        if row.num_valid < sequence_length:
            starts = np.append(starts, np.int32(row.num_valid))
        ends = starts[1:] - 1
        if row.num_valid <= sequence_length:
            ends = np.append(ends, np.arange(row.num_valid - 1, sequence_length, dtype=np.int32))
        masked.append(ends + number * sequence_length)
        row_starts.append(starts[starts < sequence_length])
    masked_places = np.concatenate(masked)
    labels.reshape(-1)[masked_places] = IGNORED_LABEL
    loss_mask = np.ones(num_rows * sequence_length, dtype=np.bool_)
    loss_mask[masked_places] = False
    return _with_positions(tokens, labels, loss_mask.reshape(tokens.shape), row_starts)


def _with_positions(
    tokens: Int64, labels: Int64, loss_mask: npt.NDArray[np.bool_], row_starts: Sequence[Int32]
) -> RowArrays:
    num_rows, sequence_length = tokens.shape
    flat_starts = np.concatenate([starts + number * sequence_length for number, starts in enumerate(row_starts)])
    cu_seqlens = np.append(flat_starts, num_rows * sequence_length).astype(np.int32)
    lengths = np.diff(cu_seqlens)
    positions = np.arange(num_rows * sequence_length, dtype=np.int32)
    positions -= np.repeat(cu_seqlens[:-1], lengths)
    numbers = np.concatenate([np.arange(len(starts), dtype=np.int32) for starts in row_starts])
    return RowArrays(
        tokens=tokens,
        labels=labels,
        loss_mask=loss_mask,
        positions=positions.reshape(num_rows, sequence_length),
        document_ids=np.repeat(numbers, lengths).reshape(num_rows, sequence_length),
        cu_seqlens=cu_seqlens,
    )


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

    Longer documents are cut into full rows and a rest. Each piece goes to the fullest row that still holds it (Ding
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
    begins, lengths = begins[lengths > 0], lengths[lengths > 0]
    pieces = -(-lengths // capacity)
    number = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    first = np.repeat(begins, pieces) + number * capacity
    return first, np.minimum(capacity, np.repeat(begins + lengths, pieces) - first)
