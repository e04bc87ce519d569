"""What the two branches of `{window_linear}` compute: sums of softmax over windows, and one state read by several queries.

Query heads that share a key head read one state: `SharedReads` scans once for each query head of a state, and only one
state passes on to decoding and between context ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from amfm.kernels.attention.op import note_choice
from amfm.kernels.attention.torch_impl import cut_blocks, join_blocks
from amfm.kernels.runtime.backend import resolve_backend
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


class WindowSums(NamedTuple):
    """Attention in windows with what other terms may join it by: o [B, T, H, V] is the softmax's output.

    highest [B, T, H]: the largest scaled score of each query's window. mass [B, T, H]: the sum of e^(score - highest), at
    least 1. Both in float32 (float64 for float64 inputs).
    """

    o_BTHV: Tensor
    highest_BTH: Tensor
    mass_BTH: Tensor


def window_sums(
    q_BTHK: Tensor,
    k_BSJK: Tensor,
    v_BSJK: Tensor,
    *,
    window: int,
    document_ids_BS: Tensor,
    scale: float,
    backend: str = "auto",
) -> WindowSums:
    """Attention to the last `window` keys of the document, with the largest score and the mass of each query.

    What is in no window can then join the sums: o = (mass o + other values) / (mass + other weights). Shapes as in
    `attention`. There is no Triton kernel of it: where kernels run on Triton, products of PyTorch do it.
    """
    if backend == "triton":
        note_choice("torch", "no Triton kernel gives the largest score and mass of a window; PyTorch's products do")
        backend = "torch"
    sums: dict[str, Any] = {"document_ids_BS": document_ids_BS, "scale": scale, "window": window}
    if resolve_backend(backend, q_BTHK.device, "attention") == "reference":
        return WindowSums(*window_sums_reference(q_BTHK, k_BSJK, v_BSJK, **sums))
    return window_sums_torch(q_BTHK, k_BSJK, v_BSJK, **sums)


def window_sums_torch(
    q_BTHK: Tensor, k_BSJK: Tensor, v_BSJK: Tensor, *, document_ids_BS: Tensor, scale: float, window: int
) -> WindowSums:
    """As `window_attention_torch`, with the largest score and the mass, which PyTorch's attention does not give.

    By products of its own in the same blocks: memory for [L, 2 L] scores per block and head, kept for backward.
    """
    q, k, v, mask = cut_blocks(q_BTHK, k_BSJK, v_BSJK, document_ids_BS, window)
    num_blocks, heads, block, _ = q.shape
    kv_heads = k.shape[1]
    # Queries of the heads that share a key head stand one after the other, so that one product reads the keys once.
    scores = q.reshape(num_blocks, kv_heads, -1, q.shape[3]) @ k.transpose(2, 3)
    wide = torch.promote_types(scores.dtype, torch.float32)
    scores = (scores.to(wide) * scale).view(num_blocks, heads, block, -1).masked_fill(~mask, -torch.inf)
    highest = scores.amax(-1, keepdim=True)
    weights = (scores - highest).exp()
    mass = weights.sum(-1, keepdim=True)
    o = weights.to(v.dtype).view(num_blocks, kv_heads, -1, weights.shape[3]) @ v
    o = o.view(num_blocks, heads, block, -1) / mass.to(o.dtype)
    o, highest, mass = (join_blocks(x, q_BTHK) for x in (o, highest, mass))
    return WindowSums(o.to(q_BTHK.dtype), highest[..., 0], mass[..., 0])


def window_sums_reference(
    q_BTHK: Tensor,
    k_BSJK: Tensor,
    v_BSJV: Tensor,
    *,
    document_ids_BS: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention in windows with its largest score and mass a query, from the whole matrix [T, S] of scores.

    Shapes as in `window_sums`; in the dtype of the inputs, for tests only.
    """
    tokens, keys = q_BTHK.shape[1], k_BSJK.shape[1]
    repeat = q_BTHK.shape[2] // k_BSJK.shape[2]
    k_BSHK, v_BSHV = k_BSJK.repeat_interleave(repeat, 2), v_BSJV.repeat_interleave(repeat, 2)
    distance_TS = torch.arange(keys - tokens, keys, device=q_BTHK.device)[:, None] - torch.arange(
        keys, device=q_BTHK.device
    )
    seen_BTS = ((distance_TS >= 0) & (distance_TS < window)).expand(len(q_BTHK), -1, -1)
    seen_BTS = seen_BTS & (document_ids_BS[:, keys - tokens :, None] == document_ids_BS[:, None])
    scores_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) * scale
    scores_BHTS = scores_BHTS.masked_fill(~seen_BTS[:, None], -torch.inf)
    highest_BHT = scores_BHTS.amax(-1)
    weights_BHTS = (scores_BHTS - highest_BHT[..., None]).exp()
    mass_BHT = weights_BHTS.sum(-1)
    o_BTHV = torch.einsum("bhts,bshv->bthv", weights_BHTS / mass_BHT[..., None], v_BSHV)
    return o_BTHV, highest_BHT.transpose(1, 2), mass_BHT.transpose(1, 2)
