"""Rows that hold several documents: where they begin, and the stretches of tokens that blocks mix.

A packed sequence names its documents by `position_ids` that do not continue by one, by `seq_idx`, or by `cu_seq_lens_q`.
Blocks then compute each document on its own, so that it gets the numbers that it gets without the others: bitwise, because every
product has the same shape. Padding, which `attention_mask` leaves out, begins no document.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# A row (or all rows) and its tokens, as an index of [B, T].
Place = tuple[slice, slice]


@dataclass(frozen=True)
class Stretch:
    """Tokens that mix with each other and no others.

    place: their index in [B, T]. positions_BT: for rotary embeddings. text_BS: True at text, of all tokens so far; None if
    all are text. attention_mask: the same with causality, as the attention backend takes it. tokens_BT: ids of the
    new tokens, None where embeddings were given.
    """

    place: Place
    positions_BT: Tensor
    text_BS: Tensor | None
    attention_mask: Any
    tokens_BT: Tensor | None = None

    @property
    def text_BT(self) -> Tensor | None:
        """True at text, of the new tokens."""
        return None if self.text_BS is None else self.text_BS[:, -self.positions_BT.shape[1] :]


def read_text_mask(attention_mask: Any, rows: int, seen: int, tokens: int) -> Tensor | None:
    """Read `attention_mask` [B, seen + T], 0 at padding, as booleans; None if all is text.

    Raises ValueError for other shapes: states cannot follow a mask of queries and keys.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != (rows, seen + tokens):
        shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(
            f"attention_mask is {shape}, and must be {(rows, seen + tokens)}: 0 at padding, 1 at text, of all tokens so far"
        )
    text_BS = attention_mask.bool()
    # A mask without padding says nothing; a traced graph keeps it, because it must hold for other masks.
    if not torch.compiler.is_compiling() and bool(text_BS.all()):
        return None
    return text_BS


def find_documents(
    rows: int,
    tokens: int,
    text_BT: Tensor | None,
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    cu_seq_lens: Tensor | None,
) -> list[Place] | None:
    """Find the documents of packed sequences, in order; None if each row is one.

    Raises ValueError for shapes that name no documents of these rows.
    """
    jumps = []
    if position_ids is not None:
        if position_ids.dim() != 2 or position_ids.shape[0] not in (1, rows) or position_ids.shape[1] != tokens:
            raise ValueError(f"position_ids is {tuple(position_ids.shape)}, and must be {(rows, tokens)}")
        jumps.append(position_ids[:, 1:] != position_ids[:, :-1] + 1)
    if seq_idx is not None:
        if seq_idx.shape != (rows, tokens):
            raise ValueError(f"seq_idx is {tuple(seq_idx.shape)}, and must be {(rows, tokens)}")
        jumps.append(seq_idx[:, 1:] != seq_idx[:, :-1])
    if cu_seq_lens is not None:
        jumps.append(_read_lengths(rows, tokens, cu_seq_lens))
    if not jumps or tokens == 1:
        return None
    begins = torch.stack([jump.expand(rows, -1) for jump in jumps]).any(0)
    if text_BT is not None:
        begins = begins & text_BT[:, 1:] & text_BT[:, :-1]
    if not bool(begins.any()):
        return None
    places = []
    for row in range(rows):
        edges = [0, *(begins[row].nonzero()[:, 0] + 1).tolist(), tokens]
        places += [(slice(row, row + 1), slice(start, stop)) for start, stop in itertools.pairwise(edges)]
    return places


def _read_lengths(rows: int, tokens: int, cu_seq_lens: Tensor) -> Tensor:
    """Where documents begin [1, T - 1], from the sums of their lengths, which are of one flat row."""
    edges = cu_seq_lens.tolist()
    if rows != 1 or edges[0] != 0 or edges[-1] != tokens or any(b < a for a, b in itertools.pairwise(edges)):
        raise ValueError(
            f"cu_seq_lens_q={edges} must rise from 0 to {tokens}, the tokens of one flat row, and there are {rows} rows; give "
            "seq_idx or position_ids for several"
        )
    begins = torch.zeros(1, tokens, dtype=torch.bool, device=cu_seq_lens.device)
    begins[0, [edge for edge in edges if edge < tokens]] = True
    return begins[:, 1:]


def count_positions(place: Place, text_BS: Tensor | None, seen: int, tokens: int, device: torch.device) -> Tensor:
    """Positions of a stretch if none are given: text counts from 0, so that padding before it shifts nothing."""
    if text_BS is None:
        length = len(range(*place[1].indices(tokens)))
        return torch.arange(seen, seen + length, device=device)[None]
    return (text_BS.long().cumsum(dim=-1) - 1).clamp(min=0)[:, seen:]


def by_document(function: Any, x_BTD: Tensor, places: list[Place]) -> Tensor:
    """Apply a function of [1, t, D] to each document, and put the results together again: [B, T, ...]."""
    return torch.cat([function(x_BTD[place]).flatten(0, 1) for place in places]).unflatten(0, x_BTD.shape[:2])
