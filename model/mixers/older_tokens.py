"""Linear attention over the tokens that have left a window, for mixers that attend by softmax to those inside it.

A token enters the state `width` tokens late. So the scan reads rows that are delayed by as much inside each document, and
zeros before; and since a query reads the state as it was `width` tokens ago, it is scaled by what the state would have
faded since. Equal to the sum over all pairs that are at least `width` apart, in one scan and with nothing kept of pairs.

Query heads that share a key head read one state: `SharedReads` scans once for each query head of a state, and only one
state passes on to decoding and between context ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from amfm.model.mixers.recurrence import DecayRecurrence, OpenScan, ScanRows, ScanSettings


class Rows(NamedTuple):
    """What mixing reads of tokens: q [B, T, H, K] and its features [B, T, H, F]; of key heads k, v [B, T, J, K], features
    [B, T, J, F] and log decays [B, T, J] or [B, T, J, K] in float32 at least (None: no decay)."""

    q: Tensor
    query_features: Tensor
    k: Tensor
    v: Tensor
    key_features: Tensor
    decay: Tensor | None


class Past(NamedTuple):
    """The same of key heads, of the tokens before a row, and their documents' ids [B, W]; -1: no token."""

    k: Tensor
    v: Tensor
    key_features: Tensor
    decay: Tensor | None
    ids: Tensor


class SharedReads(DecayRecurrence):
    """A decay recurrence whose J states are each read by R queries: q [B, T, J R, K], heads of a state side by side."""

    def scan(self, rows: ScanRows, how: ScanSettings, state_BHKV: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scan once for each query of a state: all outputs [B, T, J R, V], and the states [B, J, K, V]."""
        scans = [super(SharedReads, self).scan(rows._replace(q=q), how, state_BHKV) for q in _split_queries(rows, 2)]
        return torch.stack([o for o, _ in scans], dim=3).flatten(2, 3), scans[0][1]

    def scan_with_transfer(self, rows: ScanRows, how: ScanSettings) -> OpenScan:
        """Scan once for each query of a state; a read is of all queries."""
        scans = [super(SharedReads, self).scan_with_transfer(rows._replace(q=q), how) for q in _split_queries(rows, 2)]
        return OpenScan(
            torch.stack([scan.o_BTHV for scan in scans], dim=3).flatten(2, 3),
            lambda state: torch.stack([scan.read(state) for scan in scans], dim=3).flatten(2, 3),
            scans[0].final_BHKV,
            scans[0].transfer,
        )

    def step(self, rows: ScanRows, state_BHKV: Tensor) -> tuple[Tensor, Tensor]:
        """Advance by one token: outputs [B, J R, V] and the next states."""
        steps = [super(SharedReads, self).step(rows._replace(q=q), state_BHKV) for q in _split_queries(rows, 1)]
        return torch.stack([o for o, _ in steps], dim=2).flatten(1, 2), steps[0][1]


def _split_queries(rows: ScanRows, dim: int) -> tuple[Tensor, ...]:
    """Split queries by their place among those of their state, each [..., J, K]; heads stand in dimension `dim`."""
    return rows.q.unflatten(dim, (rows.k.shape[dim], -1)).unbind(dim + 1)


def delay_rows(rows: ScanRows, width: int, ids_BS: Tensor) -> ScanRows:
    """Delay the keys, values and decays of rows by `width` tokens, and let queries read the state of this many tokens ago.

    k, v and g have `width` tokens more than q, those before the row, and so have the ids of documents [B, S]. Zeros where the
    token so long ago is of another document. g is None without a decay; the result has zeros.
    """
    tokens = rows.q.shape[1]
    is_same_BT = ids_BS[:, :tokens] == ids_BS[:, width:]

    def keep(x: Tensor) -> Tensor:
        return torch.where(is_same_BT.view(*is_same_BT.shape, *[1] * (x.dim() - 2)), x, torch.zeros_like(x))

    k, v = keep(rows.k[:, :tokens]), rows.v[:, :tokens]
    if rows.g is None:
        zeros = k.new_zeros(k.shape[:3], dtype=torch.promote_types(k.dtype, torch.float32))
        return ScanRows(keep(rows.q), k, v, zeros)
    faded = window_sum(rows.g, width)[:, width:].exp()
    # [B, T, J] or [B, T, J, K], for the R queries of each state.
    faded = faded.repeat_interleave(rows.q.shape[2] // k.shape[2], dim=2)
    q = rows.q * (faded if faded.dim() == 4 else faded[..., None]).to(rows.q.dtype)
    return ScanRows(keep(q), k, v, keep(rows.g[:, :tokens]))


def window_sum(x_BSX: Tensor, width: int) -> Tensor:
    """Sum the last `width` tokens up to each, fewer at the row's start: [B, S, ...] -> the same.

    By doubling: each sum adds only its own tokens. Differences of one running sum would lose what is small next to it,
    and carry rounding from one document into the next.
    """
    total, power, size, covered = torch.zeros_like(x_BSX), x_BSX, 1, 0
    while True:
        if width & size:
            total = total + _shift(power, covered)
            covered += size
        if covered == width:
            return total
        power = power + _shift(power, size)
        size *= 2


def _shift(x_BSX: Tensor, by: int) -> Tensor:
    """Move tokens back by this many places, with zeros at the start."""
    if by >= x_BSX.shape[1]:
        return torch.zeros_like(x_BSX)
    return functional.pad(x_BSX[:, : x_BSX.shape[1] - by], (*[0, 0] * (x_BSX.dim() - 2), by, 0))
