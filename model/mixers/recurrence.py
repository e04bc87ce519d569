"""The two recurrences that carry linear mixers, as a mixer uses them: whole rows, segments of rows, one token.

Decay: S_t = diag(e^(g_t)) S_(t-1) + k_t v_t^T, with one decay a head or one per key channel (kernels/decay_scan).
Delta: S <- diag(e^(g_t)) S, with one decay a head, one per key channel or none, then for each micro-step S <- (I - beta
k e^T) S + beta k v^T, where e is k or its own vector (kernels/delta_scan).
Both read o_t = S_t^T q_t, and both are affine in the state that enters a row: S_out = P S_in + F with P and F of only the
row. That is what context parallelism lives on (model/parallel/context.py). For a decay P is a factor, for a delta rule a
K x K matrix, which costs about K / V more work and is computed only where rows are cut.

Linear attention over the tokens that have left a window, for mixers that attend by softmax to those inside it (`delay_rows`):
a token enters the state `width` tokens late. So the scan reads rows that are delayed by as much inside each document, and
zeros before; and since a query reads the state as it was `width` tokens ago, it is scaled by what the state would have
faded since. Equal to the sum over all pairs that are at least `width` apart, in one scan and with nothing kept of pairs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from amfm.kernels.decay_scan.carry import decay_read
from amfm.kernels.decay_scan.op import decay_scan, decay_step
from amfm.kernels.delta_scan.op import delta_scan, delta_step


class ScanRows(NamedTuple):
    """What a recurrence reads of rows; of one token without the dimension T.

    Decay: q and k [B, T, H, K], v [B, T, H, V], g [B, T, H] or [B, T, H, K], all of one H. Delta: q [B, T, G, K],
    k [B, T, N, G, K] of unit length, v [B, T, N, H, V], g [B, T, H], [B, T, H, K] (then N = 1, G = H) or None, beta
    [B, T, N, H], erase [B, T, H, K] (with such g) or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None = None
    beta: Tensor | None = None
    erase: Tensor | None = None


class ScanSettings(NamedTuple):
    """How rows are scanned, under the names of the kernels' arguments: where documents end, chunks, backend."""

    document_ids_BT: Tensor | None
    chunk_size: int
    backend: str


class OpenScan(NamedTuple):
    """A scan from zero that a state may still enter: o = o_BTHV + read(S_in), S_out = transfer S_in + final_BHKV.

    read: linear, from S_in [B, H, K, V] to the shape of o; 0 after the row's first document. transfer: a factor [B, H], a
    factor a row [B, H, K] or a matrix [B, H, K, K]; 0 where S_in's document ends in the row.
    """

    o_BTHV: Tensor
    read: Callable[[Tensor], Tensor]
    final_BHKV: Tensor
    transfer: Tensor


class Recurrence(ABC):
    """A linear recurrence over matrix states [B, H, K, V], reset at documents; states are float32."""

    @abstractmethod
    def scan(self, rows: ScanRows, how: ScanSettings, state_BHKV: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scan rows that begin with this state, or with zero: (o [B, T, H, V], the state after the last token)."""

    @abstractmethod
    def scan_with_transfer(self, rows: ScanRows, how: ScanSettings) -> OpenScan:
        """Scan rows from zero, with what is needed to add a state that arrives afterwards."""

    @abstractmethod
    def step(self, rows: ScanRows, state_BHKV: Tensor) -> tuple[Tensor, Tensor]:
        """Advance by one token: (o [B, H, V], the next state); the given state is not changed."""

    @abstractmethod
    def flops(self, num_heads: int, key_dim: int, value_dim: int) -> float:
        """Floating-point operations per token of the recurrence itself, forward."""


class DecayRecurrence(Recurrence):
    """S_t = diag(e^(g_t)) S_(t-1) + k_t v_t^T."""

    def scan(self, rows: ScanRows, how: ScanSettings, state_BHKV: Tensor | None) -> tuple[Tensor, Tensor]:
        """As in the base class."""
        assert rows.g is not None, "a decay recurrence needs g; zeros for no decay"
        scanned = decay_scan(rows.q, rows.k, rows.v, rows.g, initial_state_BHKV=state_BHKV, **how._asdict())
        return scanned.o_BTHV, scanned.final_state_BHKV

    def scan_with_transfer(self, rows: ScanRows, how: ScanSettings) -> OpenScan:
        """As in the base class."""
        assert rows.g is not None, "a decay recurrence needs g; zeros for no decay"
        scanned = decay_scan(rows.q, rows.k, rows.v, rows.g, **how._asdict())
        read_BTHK = decay_read(rows.q, rows.g, document_ids_BT=how.document_ids_BT)
        return OpenScan(scanned.o_BTHV, read_with(read_BTHK), scanned.final_state_BHKV, scanned.total_decay)

    def step(self, rows: ScanRows, state_BHKV: Tensor) -> tuple[Tensor, Tensor]:
        """As in the base class."""
        assert rows.g is not None, "a decay recurrence needs g; zeros for no decay"
        return decay_step(rows.q, rows.k, rows.v, rows.g, state_BHKV)

    def flops(self, num_heads: int, key_dim: int, value_dim: int) -> float:
        """Forward FLOPs per token; for each state number: decay, k times v, add, times q, add."""
        return 5.0 * num_heads * key_dim * value_dim


class DeltaRecurrence(Recurrence):
    """S <- e^(g_t) S, then S <- (I - beta k k^T) S + beta k v^T in each of a token's `num_steps` steps."""

    def __init__(self, num_steps: int = 1) -> None:
        self.num_steps = num_steps

    def scan(self, rows: ScanRows, how: ScanSettings, state_BHKV: Tensor | None) -> tuple[Tensor, Tensor]:
        """As in the base class."""
        assert rows.beta is not None, "a delta recurrence needs beta"
        inputs = (rows.q, rows.k, rows.v, rows.beta, rows.g)
        scanned = delta_scan(*inputs, erase_BTHK=rows.erase, initial_state_BHKV=state_BHKV, **how._asdict())
        return scanned.o_BTHV, scanned.final_state_BHKV

    def scan_with_transfer(self, rows: ScanRows, how: ScanSettings) -> OpenScan:
        """As in the base class; about K / V more work than `scan`."""
        assert rows.beta is not None, "a delta recurrence needs beta"
        inputs = (rows.q, rows.k, rows.v, rows.beta, rows.g)
        scanned = delta_scan(*inputs, erase_BTHK=rows.erase, with_transfer=True, **how._asdict())
        read_BTHK, transfer_BHKK = scanned.read_BTHK, scanned.transfer_BHKK
        assert read_BTHK is not None and transfer_BHKK is not None, "delta_scan gives both with_transfer"
        return OpenScan(scanned.o_BTHV, read_with(read_BTHK), scanned.final_state_BHKV, transfer_BHKK)

    def step(self, rows: ScanRows, state_BHKV: Tensor) -> tuple[Tensor, Tensor]:
        """As in the base class."""
        assert rows.beta is not None, "a delta recurrence needs beta"
        return delta_step(rows.q, rows.k, rows.v, rows.beta, rows.g, state_BHKV, rows.erase)

    def flops(self, num_heads: int, key_dim: int, value_dim: int) -> float:
        """Forward FLOPs per token; 3 for each state number (decay, q times it, add) and 4 more in each step.

        A step multiplies by k and adds, to read what the state holds, then multiplies the difference by k and adds it.
        """
        return (3.0 + 4.0 * self.num_steps) * num_heads * key_dim * value_dim


def read_with(read_BTHK: Tensor) -> Callable[[Tensor], Tensor]:
    """Build the function that reads a state [B, H, K, V] with a vector a token and head, [B, T, H, K] -> [B, T, H, V]."""

    def read(state_BHKV: Tensor) -> Tensor:
        return torch.matmul(read_BTHK.transpose(1, 2), state_BHKV.to(read_BTHK.dtype)).transpose(1, 2)

    return read


def add_initial_state(scan: OpenScan, state_BHKV: Tensor) -> Tensor:
    """Complete a scan from zero for the state that entered its rows: o [B, T, H, V], in the dtype of the scan's output."""
    return (scan.o_BTHV + scan.read(state_BHKV)).to(scan.o_BTHV.dtype)


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
