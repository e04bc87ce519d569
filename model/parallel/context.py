"""Context parallelism: what ranks exchange while each computes its segments of every row.

A recurrence needs the state that the tokens before a segment leave behind, and no more: each rank scans its segments from
zero, gives their last states and total decays to all, and every rank composes the states that enter its own. That is one
collective per layer each way, of a size that does not depend on the row's length. A convolution needs the few inputs
before the segment, attention the keys and values of the whole row. Every rank of `groups.cp` must call these functions;
backward passes exchange as much as forward ones. Tensors of a rank's segments are [B, 2, ...], as `Segments` orders
them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.autograd.function import once_differentiable

from amfm.kernels.runtime.compiling import disable_compile
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.segments import Segments


@disable_compile
def receive_windows(inputs_RLC: Tensor, width: int, segments: Segments, groups: ProcessGroupCollection) -> Tensor:
    """Receive the `width` inputs before each of this rank's segments: [R, width, C], from inputs [R, L, C] of all segments.

    Segments are rows, as `Segments.as_rows` makes them. Zeros for inputs of another document than the segment's first
    token, which a causal convolution must not see. A rank sends R width C numbers, to its neighbours. Raises ValueError
    if segments are shorter than `width`: a neighbour could not give them all.
    """
    if width == 0:
        return inputs_RLC[:, :0]
    windows_B2WC: Tensor = _ReceiveTails.apply(_tails(inputs_RLC, width, segments), segments, groups.cp)
    return _hide_others(windows_B2WC, segments).flatten(0, 1)


@disable_compile
def receive_states(final_B2HKV: Tensor, transfer: Tensor, segments: Segments, groups: ProcessGroupCollection) -> Tensor:
    """Compute the state that enters each of this rank's segments, [B, 2, H, K, V], from what every segment does to states.

    final [B, 2, H, K, V] is the state after a segment that began with zero, transfer what the segment does to an
    entering state: a factor [B, 2, H], a factor a row [B, 2, H, K], or a matrix [B, 2, H, K, K] to its left; 0 where its
    document ends inside. A state stops where a document does. A rank gives its final states and transfers to all others.
    """
    states_B2HKV: Tensor = _ReceiveStates.apply(final_B2HKV, transfer, segments, groups.cp)
    return states_B2HKV


@disable_compile
def gather_rows(parts_CBTX: Tensor, segments: Segments, groups: ProcessGroupCollection) -> Tensor:
    """Gather whole rows from all ranks' segments: [C, B, T / ranks, ...] -> [C, B, T, ...]; backward sums gradients."""
    rows_CBTX: Tensor = _GatherRows.apply(parts_CBTX, segments, groups.cp)
    return rows_CBTX


class SegmentExchange:
    """What Mamba2's mixer as one operation asks of context ranks (kernels/mamba2/rank_part.py): the functions above without autograd."""

    def __init__(self, segments: Segments, groups: ProcessGroupCollection) -> None:
        self.segments, self.group = segments, groups.cp

    def windows(self, inputs_RLC: Tensor, width: int) -> Tensor:
        """The inputs before each segment, as `receive_windows`."""
        tails_B2WC = _tails(inputs_RLC, width, self.segments)
        return _hide_others(_pass_tails(tails_B2WC, self.segments, self.group), self.segments).flatten(0, 1)

    def windows_back(self, d_windows_RWC: Tensor) -> Tensor:
        """Gradients of the last inputs of each segment."""
        d_windows_B2WC = _hide_others(d_windows_RWC.unflatten(0, (-1, 2)), self.segments)
        return _return_tails(d_windows_B2WC, self.segments, self.group).flatten(0, 1)

    def states(self, final_RHKV: Tensor, factor_RH: Tensor) -> tuple[Tensor, Tensor]:
        """The state that enters each segment, as `receive_states`, and the transfers of all segments."""
        final_B2HKV, factor_B2H = final_RHKV.unflatten(0, (-1, 2)), factor_RH.unflatten(0, (-1, 2))
        entering_B2HKV, transfer_Z = _compose(final_B2HKV, factor_B2H, self.segments, self.group)
        return entering_B2HKV.flatten(0, 1), transfer_Z

    def states_back(self, d_entering_RHKV: Tensor, transfer_Z: Tensor) -> Tensor:
        """Gradients of the state after each segment."""
        d_entering_B2HKV = d_entering_RHKV.unflatten(0, (-1, 2))
        return _compose_back(d_entering_B2HKV, transfer_Z, self.segments, self.group).flatten(0, 1)


def _tails(inputs_RLC: Tensor, width: int, segments: Segments) -> Tensor:
    """The last `width` inputs of each segment, [B, 2, width, C]; ValueError if a segment has fewer."""
    if segments.length < width:
        raise ValueError(
            f"segments of {segments.length} tokens are shorter than the {width} before each that a convolution or window "
            "reads; use longer sequences or fewer context ranks"
        )
    return inputs_RLC[:, segments.length - width :].unflatten(0, (-1, 2))


def _hide_others(windows_B2WC: Tensor, segments: Segments) -> Tensor:
    """Zeros for inputs of another document than the segment's first token."""
    seen_B2W1 = segments.window_mask(windows_B2WC.shape[2])[..., None]
    return torch.where(seen_B2W1, windows_B2WC, torch.zeros_like(windows_B2WC))


class _ReceiveTails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tails_B2WC: Tensor, segments: Segments, group: Any) -> Tensor:
        ctx.segments, ctx.group = segments, group
        return _pass_tails(tails_B2WC, segments, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_windows_B2WC: Tensor) -> tuple[Tensor, None, None]:
        return _return_tails(d_windows_B2WC, ctx.segments, ctx.group), None, None


def _pass_tails(tails_B2WC: Tensor, segments: Segments, group: Any) -> Tensor:
    """Give segment z + 1 the tail of segment z, which is on a neighbouring rank, or on the same one at the row's middle."""
    first, second = tails_B2WC.unbind(1)
    from_lower, from_higher = _swap_with_neighbours(second, first, segments, group)
    return torch.stack([from_lower, first if _is_middle(segments) else from_higher], dim=1)


def _return_tails(d_windows_B2WC: Tensor, segments: Segments, group: Any) -> Tensor:
    """The gradient of `_pass_tails`: each segment's window goes back to whose tail it was."""
    first, second = d_windows_B2WC.unbind(1)
    from_lower, from_higher = _swap_with_neighbours(first, second, segments, group)
    return torch.stack([second if _is_middle(segments) else from_higher, from_lower], dim=1)


def _is_middle(segments: Segments) -> bool:
    """Whether this rank's two segments are neighbours in the row: only those of the last rank are."""
    return segments.rank == segments.num_ranks - 1


def _swap_with_neighbours(to_lower: Tensor, to_higher: Tensor, segments: Segments, group: Any) -> tuple[Tensor, Tensor]:
    """Send one tensor to the previous rank and one to the next; returns what those sent, zeros if there is no rank."""
    # One all-to-all with empty parts for all others: sends and receives in pairs could wait for each other.
    rank, num_ranks = segments.rank, segments.num_ranks
    neighbours = {rank - 1: to_lower, rank + 1: to_higher}
    counts = [to_lower.numel() if other in neighbours else 0 for other in range(num_ranks)]
    sent = torch.cat([neighbours[other].flatten() for other in range(num_ranks) if other in neighbours])
    received = torch.empty_like(sent)
    torch.distributed.all_to_all_single(received, sent, counts, counts, group=group)
    parts = dict(zip(range(num_ranks), received.split(counts)))
    zeros = torch.zeros_like(to_lower)
    lower = parts[rank - 1].view_as(to_lower) if rank > 0 else zeros
    higher = parts[rank + 1].view_as(to_lower) if rank + 1 < num_ranks else zeros
    return lower, higher


class _ReceiveStates(torch.autograd.Function):
    """`_compose`, which keeps this rank's entering states and everyone's transfers for backward."""

    @staticmethod
    def forward(ctx: Any, final_B2HKV: Tensor, transfer: Tensor, segments: Segments, group: Any) -> Tensor:
        entering_B2HKV, transfer_Z = _compose(final_B2HKV, transfer, segments, group)
        ctx.save_for_backward(entering_B2HKV, transfer_Z)
        ctx.segments, ctx.group = segments, group
        return entering_B2HKV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_entering_B2HKV: Tensor) -> tuple[Tensor, Tensor, None, None]:
        entering_B2HKV, transfer_Z = ctx.saved_tensors
        d_final_B2HKV = _compose_back(d_entering_B2HKV, transfer_Z, ctx.segments, ctx.group)
        if transfer_Z.dim() == d_entering_B2HKV.dim():
            return d_final_B2HKV, d_final_B2HKV @ entering_B2HKV.transpose(-1, -2), None, None
        # A factor a row sums over the row's values, a factor a head over the whole state.
        d_transfer = (entering_B2HKV * d_final_B2HKV).sum(-1)
        return d_final_B2HKV, d_transfer if transfer_Z.dim() == 4 else d_transfer.sum(-1), None, None


def _compose(final_B2HKV: Tensor, transfer: Tensor, segments: Segments, group: Any) -> tuple[Tensor, Tensor]:
    """Compose states over the segments from the row's start, after one all-gather: this rank's entering, everyone's transfers.

    With S_z the state entering segment z and F_z the one after it, F_z = P_z S_z + final_z, and S_(z+1) is F_z where
    the document continues, else 0.
    """
    # States and transfers of a head go side by side, so that one collective carries both.
    numbers = final_B2HKV[0, 0, 0].numel()
    summary = torch.cat(
        [final_B2HKV.flatten(3), transfer.flatten(3) if transfer.dim() > 3 else transfer[..., None]], -1
    )
    gathered_ZBHX = segments.order(_all_gather(summary.transpose(0, 1), segments, group))
    final_ZBHKV = gathered_ZBHX[..., :numbers].unflatten(-1, final_B2HKV.shape[3:])
    transfer_Z = gathered_ZBHX[..., numbers:].reshape(segments.count, len(transfer), *transfer.shape[2:])
    entering: dict[int, Tensor] = {}
    state_BHKV = torch.zeros_like(final_ZBHKV[0])
    # Up to this rank's last segment: what comes after it enters no state here.
    for number in range(segments.own[1] + 1):
        if number in segments.own:
            entering[number] = state_BHKV
        after_BHKV = _pass_through(transfer_Z[number], state_BHKV) + final_ZBHKV[number]
        state_BHKV = _stop_at_documents(after_BHKV, number + 1, segments)
    return torch.stack([entering[number] for number in segments.own], dim=1), transfer_Z


def _compose_back(d_entering_B2HKV: Tensor, transfer_Z: Tensor, segments: Segments, group: Any) -> Tensor:
    """The same from the row's end: gradients of the states after this rank's segments, [B, 2, H, K, V], which are those of final.

    d_entering: only of what reads the entering states inside the segments.
    """
    d_entering_ZBHKV = segments.order(_all_gather(d_entering_B2HKV.transpose(0, 1), segments, group))
    is_matrix = transfer_Z.dim() == d_entering_ZBHKV.dim()
    # d_after[z]: gradient of F_z, the state after segment z, which is that of final_z and, times S_z, of P_z.
    d_after: dict[int, Tensor] = {}
    d_after_BHKV = torch.zeros_like(d_entering_ZBHKV[0])
    for number in reversed(range(segments.own[0], segments.count)):
        if number in segments.own:
            d_after[number] = d_after_BHKV
        back = transfer_Z[number].transpose(-1, -2) if is_matrix else transfer_Z[number]
        d_state_BHKV = _pass_through(back, d_after_BHKV) + d_entering_ZBHKV[number]
        d_after_BHKV = _stop_at_documents(d_state_BHKV, number, segments)
    return torch.stack([d_after[number] for number in segments.own], dim=1)


def _pass_through(transfer: Tensor, state_BHKV: Tensor) -> Tensor:
    """Apply a segment's transfer, [B, H], [B, H, K] or [B, H, K, K], to a state."""
    if transfer.dim() == 4:
        return transfer @ state_BHKV
    return transfer.view(*transfer.shape, *[1] * (4 - transfer.dim())) * state_BHKV


def _stop_at_documents(state_BHKV: Tensor, number: int, segments: Segments) -> Tensor:
    """Zero the state where a document ends before segment `number`; after the row's last segment it is zero."""
    if number == segments.count:
        return torch.zeros_like(state_BHKV)
    goes_on_B = segments.continues_BZ[:, number].view(-1, 1, 1, 1)
    return torch.where(goes_on_B, state_BHKV, torch.zeros_like(state_BHKV))


class _GatherRows(torch.autograd.Function):
    """All-gather of segments into rows; backward is a reduce-scatter, because every rank read the whole rows."""

    @staticmethod
    def forward(ctx: Any, parts_CBTX: Tensor, segments: Segments, group: Any) -> Tensor:
        ctx.segments, ctx.group = segments, group
        both_2CBLX = parts_CBTX.unflatten(2, (2, segments.length)).movedim(2, 0)
        ordered_ZCBLX = segments.order(_all_gather(both_2CBLX, segments, group))
        return ordered_ZCBLX.movedim(0, 2).flatten(2, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows_CBTX: Tensor) -> tuple[Tensor, None, None]:
        segments: Segments = ctx.segments
        d_ZCBLX = d_rows_CBTX.unflatten(2, (segments.count, segments.length)).movedim(2, 0)
        sent = segments.by_rank(d_ZCBLX).contiguous()
        own_2CBLX = torch.empty_like(sent[0])
        torch.distributed.reduce_scatter_tensor(own_2CBLX, sent.flatten(0, 1), group=ctx.group)
        return own_2CBLX.movedim(0, 2).flatten(2, 3), None, None


def _all_gather(part: Tensor, segments: Segments, group: Any) -> Tensor:
    """Gather equal shapes [N, ...] of every rank -> [ranks, N, ...], in rank order."""
    part = part.contiguous()
    gathered = part.new_empty(segments.num_ranks * part.shape[0], *part.shape[1:])
    torch.distributed.all_gather_into_tensor(gathered, part, group=group)
    return gathered.unflatten(0, (segments.num_ranks, part.shape[0]))
