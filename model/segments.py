"""How context parallelism cuts the sequences of a micro-batch over ranks.

A row is cut into 2 x ranks equal segments, and rank r takes segments r and 2 x ranks - 1 - r. In causal attention segment z
reads z + 1 segments of keys, so each rank reads 2 x ranks + 1 in sum: the same work, where one contiguous run a rank would
give the last rank nearly twice the mean. Recurrences do the same work anywhere and lose nothing.

The cut is known only from shapes, except where documents begin: `continues_BZ` and the ids of whole rows are found once
for a micro-batch, so that states and windows stop at documents without another look at the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from amfm.kernels.attention.varlen import DocumentEnds
from amfm.kernels.common.inputs import first_tokens


@dataclass(frozen=True)
class Segments:
    """This rank's two segments of every row: numbers `rank` and `2 * num_ranks - 1 - rank` of Z = 2 * num_ranks equal ones.

    One from either end: in causal attention all ranks then see equally many keys. They stand one after the other in
    whatever is cut, [B, T / num_ranks, ...]. document_ids_BT [B, T] int32 are those of the whole rows. continues_BZ
    [B, Z]: the segment's first token continues with the document of the segment before it. document_ends: of each of
    the two, for attention to the keys up to its own end, where they were asked for (`find_ends`).
    """

    rank: int
    num_ranks: int
    document_ids_BT: Tensor
    continues_BZ: Tensor
    document_ends: tuple[DocumentEnds, ...] = ()

    @classmethod
    def of_rows(cls, document_ids_BT: Tensor, rank: int, num_ranks: int) -> Segments:
        """Cut rows with these document ids. Raises ValueError if their length is not a multiple of 2 * num_ranks."""
        num_tokens, count = document_ids_BT.shape[1], 2 * num_ranks
        if num_tokens % count:
            raise ValueError(
                f"sequences of {num_tokens} tokens cannot be cut into 2 x {num_ranks} equal segments; use a multiple of {count}"
            )
        length = num_tokens // count
        # A row's first segment continues nothing; each other one compares its first token with the one before.
        continues_BZ = torch.zeros(len(document_ids_BT), count, dtype=torch.bool, device=document_ids_BT.device)
        continues_BZ[:, 1:] = document_ids_BT[:, length::length] == document_ids_BT[:, length - 1 : -1 : length]
        return cls(rank, num_ranks, document_ids_BT, continues_BZ)

    def of_some(self, rows: slice) -> Segments:
        """The same segments of some of the rows."""
        return replace(
            self,
            document_ids_BT=self.document_ids_BT[rows],
            continues_BZ=self.continues_BZ[rows],
            document_ends=(),
        )

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Segments:
        """Apply a function to every tensor, such as a move to a device."""
        return replace(
            self,
            document_ids_BT=change(self.document_ids_BT),
            continues_BZ=change(self.continues_BZ),
            document_ends=tuple(ends.map_tensors(change) for ends in self.document_ends),
        )

    def find_ends(self) -> Segments:
        """The same segments with `document_ends`. Reads values: call it before they move to a device."""
        starts_BT = first_tokens(self.document_ids_BT)
        return replace(self, document_ends=tuple(self._ends_of(number, starts_BT) for number in self.own))

    def _ends_of(self, number: int, starts_BT: Tensor) -> DocumentEnds:
        """Documents of segment `number` of all rows: its queries, and keys of the row up to its end.

        The first document's keys begin before the segment where it continues; those before that are a document without
        queries.
        """
        begin, seen = number * self.length, (number + 1) * self.length
        own_BL = starts_BT[:, begin:seen]
        column_L = torch.arange(begin, seen)
        is_first_BL = own_BL == column_L
        is_first_BL[:, 0] = True
        row_N, place_N = is_first_BL.nonzero().unbind(1)
        queries_N, keys_N = row_N * self.length + place_N, row_N * seen + own_BL[row_N, place_N]
        hidden_M = (own_BL[:, 0] > 0).nonzero().flatten()
        queries_N = torch.cat([queries_N, hidden_M * self.length])
        keys_N = torch.cat([keys_N, hidden_M * seen])
        order_N, end = keys_N.argsort(), len(starts_BT)
        offsets, key_offsets = (
            torch.cat([places_N[order_N], torch.tensor([end * width])])
            for places_N, width in ((queries_N, self.length), (keys_N, seen))
        )
        longest, longest_keys = (int(places.diff().max()) for places in (offsets, key_offsets))
        return DocumentEnds(offsets.to(torch.int32), longest, key_offsets.to(torch.int32), longest_keys)

    @property
    def count(self) -> int:
        """Number of segments of a row, Z."""
        return 2 * self.num_ranks

    @property
    def length(self) -> int:
        """Tokens of a segment."""
        return self.document_ids_BT.shape[1] // self.count

    @property
    def own(self) -> tuple[int, int]:
        """Numbers of this rank's two segments."""
        return self.rank, self.count - 1 - self.rank

    def take(self, x_BT: Tensor) -> Tensor:
        """Cut this rank's part [B, T / num_ranks, ...] out of whole rows [B, T, ...]."""
        parts = x_BT.chunk(self.count, dim=1)
        return torch.cat([parts[number] for number in self.own], dim=1)

    def as_rows(self, x_BT: Tensor) -> Tensor:
        """View this rank's segments as their own rows: [B, T / num_ranks, ...] -> [2 B, T / (2 num_ranks), ...].

        Rows alternate: the first segment of row 0, its second, the first of row 1; `unflatten(0, (B, 2))` inverts it.
        """
        return x_BT.unflatten(1, (2, self.length)).flatten(0, 1)

    def order(self, gathered: Tensor) -> Tensor:
        """Put the segments of all ranks into their order in the row: [num_ranks, 2, ...] -> [Z, ...]."""
        return torch.cat([gathered[:, 0], gathered[:, 1].flip(0)])

    def by_rank(self, ordered: Tensor) -> Tensor:
        """Invert `order`: [Z, ...] -> [num_ranks, 2, ...]."""
        return torch.stack([ordered[: self.num_ranks], ordered[self.num_ranks :].flip(0)], dim=1)

    def window_mask(self, width: int) -> Tensor:
        """Mask of the `width` tokens before each of this rank's segments that are in its first document: [B, 2, width].

        bool; all False before the row's first segment. width must be at most `length`.
        """
        ids_BT, masks = self.document_ids_BT, []
        for number in self.own:
            start = number * self.length
            if start == 0:
                masks.append(torch.zeros(len(ids_BT), width, dtype=torch.bool, device=ids_BT.device))
            else:
                masks.append(ids_BT[:, start - width : start] == ids_BT[:, start : start + 1])
        return torch.stack(masks, dim=1)
