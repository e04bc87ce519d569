"""Where documents begin and end in a packed micro-batch.

A packed sequence holds several documents, and nothing may pass from one to the next: attention masks, convolutions and
recurrent states reset. What blocks need for that is found once, on the CPU, while the micro-batch is still there (reading
a value of a device tensor makes the host wait for all that is queued), and moved to the device as a whole. No block looks
at values again: whether there is anything to reset at all is a Python bool.

CUDA graphs read a micro-batch's layout at addresses that stay (`FixedLayout`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from operator import itemgetter

import torch
from torch import Tensor

from amfm.kernels.attention.varlen import DocumentEnds
from amfm.kernels.common.inputs import first_tokens
from amfm.model.segments import Segments

Mean = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Padding:
    """Places after the last document of a row, which no router chooses experts for.

    is_padding_BT bool. lengths_B: tokens of each whole row before them; num_tokens: their sum.
    """

    is_padding_BT: Tensor
    lengths_B: Tensor
    num_tokens: int

    @classmethod
    def of_lengths(cls, lengths_B: Tensor, num_tokens: int) -> Padding:
        """Padding of rows of this many places. Reads values: give it a tensor on the CPU."""
        return cls(torch.arange(num_tokens) >= lengths_B[:, None], lengths_B, int(lengths_B.sum()))

    def of_some(self, rows: slice) -> Padding:
        """The padding of some of the rows. Reads values on the host."""
        lengths_B = self.lengths_B[rows]
        return Padding(self.is_padding_BT[rows], lengths_B, int(lengths_B.sum()))

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Padding:
        """Apply a function to every tensor."""
        return replace(self, is_padding_BT=change(self.is_padding_BT), lengths_B=change(self.lengths_B))


def means_without(padding: Padding, num_ranks: int) -> tuple[Mean, Mean]:
    """Means over all tokens [R, ...], and over those of each row [B, T, E], that leave out padding.

    Each is the context rank's share times `num_ranks`, so that their mean over these ranks is the whole one.
    """
    valid_BT = ~padding.is_padding_BT
    lengths_B = padding.lengths_B.clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        is_valid_R = valid_BT.flatten().view(-1, *(1,) * (values.dim() - 1))
        return values.masked_fill(~is_valid_R, 0.0).sum(0) * num_ranks / lengths_B.sum()

    def row_mean(values_BTE: Tensor) -> Tensor:
        return values_BTE.masked_fill(~valid_BT[..., None], 0.0).sum(1) * num_ranks / lengths_B[:, None]

    return mean, row_mean


@dataclass(frozen=True)
class PackMeta:
    """Document layout of one micro-batch of B sequences of T tokens.

    document_ids_BT [B, T] int32, nondecreasing inside a row. positions_BT [B, T] int32, the place inside the document.
    starts_BT [B, T] int32, the place in the row of the first token of each token's document, and document_ends, the same of
    all rows laid end to end, where they were asked for (`find_bounds`). single_document: no row has a boundary, so blocks may
    take the path without masks. first_continues: each row's first token continues with the document that a decode state
    holds.
    segments: where ids and positions are those of this rank's part of the rows, T its tokens, and starts_BT counts places in each
    of its segments; the other fields stay those of whole rows. halves: the layouts of the first and second half of the rows, if these alternate through the blocks (`with_halves`). padding: where rows may be padded; None: nowhere.
    tokens_BT: int64, for blocks that look tokens up, once a model has both (`with_tokens`).
    choices: of experts that were made elsewhere, [B, T, K] int64 by the index of a block, which its router then replays; a block
    without any chooses itself. own_choices_BTK: those of the block that reads the layout (`of_block`).
    """

    document_ids_BT: Tensor
    positions_BT: Tensor
    single_document: bool
    first_continues: bool = False
    segments: Segments | None = None
    starts_BT: Tensor | None = None
    document_ends: DocumentEnds | None = None
    halves: tuple[PackMeta, ...] = ()
    padding: Padding | None = None
    tokens_BT: Tensor | None = None
    choices: Mapping[int, Tensor] | None = None
    own_choices_BTK: Tensor | None = None

    @classmethod
    def from_document_ids(cls, document_ids_BT: Tensor, positions_BT: Tensor | None = None) -> PackMeta:
        """Build the layout of packed sequences; positions restart at each document when they are not given.

        Reads values: give it tensors on the CPU and move the result. Raises ValueError if ids decrease inside a row.
        """
        if document_ids_BT.dim() != 2 or document_ids_BT.numel() == 0:
            raise ValueError(f"document_ids must be [rows, tokens] and not empty, not {tuple(document_ids_BT.shape)}")
        steps_BT = torch.diff(document_ids_BT, dim=1)
        if bool((steps_BT < 0).any()):
            raise ValueError("document_ids must not decrease inside a row; number documents in the order they stand")
        if positions_BT is None:
            column_T = torch.arange(document_ids_BT.shape[1], device=document_ids_BT.device)
            starts_BT = torch.nn.functional.pad(steps_BT > 0, (1, 0), value=True)
            positions_BT = column_T - torch.where(starts_BT, column_T, 0).cummax(dim=1).values
        return cls(
            document_ids_BT=document_ids_BT.to(torch.int32),
            positions_BT=positions_BT.to(torch.int32),
            single_document=not bool(steps_BT.any()),
        )

    @classmethod
    def one_document_a_row(
        cls, num_rows: int, num_tokens: int, *, start: int = 0, device: torch.device | str | None = None
    ) -> PackMeta:
        """Build the layout of rows without boundaries whose first token has position `start`; start > 0 continues a state."""
        ids_BT = torch.zeros(num_rows, num_tokens, dtype=torch.int32, device=device)
        positions_T = torch.arange(start, start + num_tokens, dtype=torch.int32, device=device)
        return cls(ids_BT, positions_T.expand(num_rows, -1), single_document=True, first_continues=start > 0)

    def cut(self, rank: int, num_ranks: int) -> PackMeta:
        """Cut out the part of these rows that one of `num_ranks` context ranks has; with one rank, all of them.

        Cut tokens and labels alike, with `segments.take`. No collectives: every rank has the whole rows. Positions stay those
        of the whole rows, so rotary embeddings need nothing more. Raises ValueError if rows cannot be cut evenly.
        """
        assert not self.halves, "rows are cut before they are halved"
        if num_ranks == 1:
            return self
        segments = Segments.of_rows(self.document_ids_BT, rank, num_ranks)
        padding = self.padding
        if padding is not None:
            padding = replace(padding, is_padding_BT=segments.take(padding.is_padding_BT))
        return replace(
            self,
            document_ids_BT=segments.take(self.document_ids_BT),
            positions_BT=segments.take(self.positions_BT),
            segments=segments,
            starts_BT=None,
            document_ends=None,
            padding=padding,
            tokens_BT=None,
            choices=_map_choices(self.choices, segments.take),
        )

    def with_tokens(self, tokens_BT: Tensor) -> PackMeta:
        """The same layout with the tokens that it lays out, of this rank where rows are cut; nothing is copied."""
        parts = tokens_BT.chunk(max(1, len(self.halves)))
        halves = tuple(half.with_tokens(part) for half, part in zip(self.halves, parts))
        return replace(self, tokens_BT=tokens_BT, halves=halves)

    def of_block(self, index: int) -> PackMeta:
        """The layout as the block of this index reads it."""
        return self if self.choices is None else replace(self, own_choices_BTK=self.choices.get(index))

    def find_bounds(self) -> PackMeta:
        """The same layout with `starts_BT` and `document_ends`, found once on the CPU for all blocks whose kernels take them.

        Of rows that are cut over context ranks, the ends of each segment (`Segments.find_ends`); whole rows without boundaries need
        none. Reads values: call it before the layout moves to a device.
        """
        halves = tuple(half.find_bounds() for half in self.halves)
        if self.segments is not None:
            starts_BT = self.document_starts_BT()
            return replace(self, starts_BT=starts_BT, segments=self.segments.find_ends(), halves=halves)
        if self.single_document:
            return self
        starts_BT = first_tokens(self.document_ids_BT)
        num_rows, num_tokens = starts_BT.shape
        first_N = (starts_BT == torch.arange(num_tokens)).flatten().nonzero().flatten()
        offsets = torch.cat([first_N, torch.tensor([num_rows * num_tokens])])
        ends = DocumentEnds(offsets.to(torch.int32), int(offsets.diff().max()))
        return replace(self, starts_BT=starts_BT, document_ends=ends, halves=halves)

    def with_halves(self) -> PackMeta:
        """The same layout with those of both halves of an even number of rows, which then alternate through the blocks (model/mtp.py)."""
        half = len(self.document_ids_BT) // 2
        assert 2 * half == len(self.document_ids_BT), "checked: two-batch overlap has an even number of rows"
        halves = tuple(
            replace(
                self,
                document_ids_BT=self.document_ids_BT[rows],
                positions_BT=self.positions_BT[rows],
                segments=None if self.segments is None else self.segments.of_some(rows),
                starts_BT=None,
                document_ends=None,
                padding=None if self.padding is None else self.padding.of_some(rows),
                choices=_map_choices(self.choices, itemgetter(rows)),
            )
            for rows in (slice(half), slice(half, None))
        )
        return replace(self, halves=halves)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> PackMeta:
        """Apply a function to every tensor of the layout, such as a move to a device. Shapes and values must stay."""
        ends = self.document_ends
        return replace(
            self,
            document_ids_BT=change(self.document_ids_BT),
            positions_BT=change(self.positions_BT),
            segments=None if self.segments is None else self.segments.map_tensors(change),
            starts_BT=None if self.starts_BT is None else change(self.starts_BT),
            document_ends=None if ends is None else ends.map_tensors(change),
            halves=tuple(half.map_tensors(change) for half in self.halves),
            tokens_BT=None if self.tokens_BT is None else change(self.tokens_BT),
            padding=None if self.padding is None else self.padding.map_tensors(change),
            choices=_map_choices(self.choices, change),
        )

    def boundaries_BT(self) -> Tensor | None:
        """Document ids [B, T] where kernels must reset at documents; None if there is nothing to reset.

        None lets kernels take the path without masks; it is decided by a bool that was read on the CPU.
        """
        return None if self.single_document else self.document_ids_BT

    def document_starts_BT(self) -> Tensor | None:
        """The place of the first token of each token's document [B, T] int32; None if there is nothing to reset.

        In the segment, of rows that are cut. On the device, where `find_bounds` was not asked before the layout moved there.
        """
        if self.single_document or self.starts_BT is not None:
            return self.starts_BT
        ids_BT = self.document_ids_BT if self.segments is None else self.segments.as_rows(self.document_ids_BT)
        return first_tokens(ids_BT).view(self.document_ids_BT.shape)


def _map_choices(
    choices: Mapping[int, Tensor] | None, change: Callable[[Tensor], Tensor]
) -> Mapping[int, Tensor] | None:
    """Apply a function to the choices of each block."""
    return None if choices is None else {index: change(choices_BTK) for index, choices_BTK in choices.items()}


class FixedLayout:
    """The layout of rows, whatever documents they hold, in tensors that each micro-batch is copied to.

    Rows without boundaries are read as rows with them: one list of launches serves both.
    """

    def __init__(self, meta: PackMeta) -> None:
        self.last: PackMeta | None = None
        self.meta = replace(
            meta,
            document_ids_BT=meta.document_ids_BT.clone(),
            positions_BT=meta.positions_BT.clone(),
            starts_BT=torch.empty_like(meta.document_ids_BT),
            single_document=False,
            document_ends=None,
            padding=None if meta.padding is None else meta.padding.map_tensors(torch.clone),
        )
        self.take(meta)

    def take(self, meta: PackMeta) -> None:
        """Copy the layout of a micro-batch, once for all of its blocks."""
        if meta is self.last:
            return
        assert self.meta.starts_BT is not None and meta.segments is None and not meta.halves
        self.meta.document_ids_BT.copy_(meta.document_ids_BT)
        self.meta.positions_BT.copy_(meta.positions_BT)
        if self.meta.padding is not None and meta.padding is not None:
            self.meta.padding.is_padding_BT.copy_(meta.padding.is_padding_BT)
            self.meta.padding.lengths_B.copy_(meta.padding.lengths_B)
        starts_BT = meta.document_starts_BT()
        self.meta.starts_BT.zero_() if starts_BT is None else self.meta.starts_BT.copy_(starts_BT)
        self.last = meta
