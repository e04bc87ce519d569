"""Who orthogonalises which matrix, and how the ranges that ZeRO left to data ranks are sent to the owner and back.

Every matrix has one owner among the data ranks that hold its ranges. Owners are dealt by cost, the heaviest matrices first,
each to the rank with the least so far: a function of names, shapes and the number of ranks, so that all ranks know it without
a word. One all-to-all brings the ranges of the updates to the owners, one brings the results back: 2 x 2 bytes per
parameter and step in bf16. The owner's numbers are those that everyone steps with, so replicas stay bitwise equal.

Without ZeRO every rank has all updates already, and one all-gather of the owners' results remains.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from amfm.model.matrices import MatrixStack
from amfm.pretrain.engine.muon.newton_schulz import BATCH_ELEMENTS, cost
from amfm.pretrain.engine.parts import Part, Span


@dataclass(frozen=True)
class Overlap:
    """A range of updates that belongs to a matrix: its place among a rank's updates and among the owner's matrices."""

    place: int
    owned: int
    numel: int


def deal_owners(stacks: Sequence[MatrixStack], num_ranks: int) -> list[int]:
    """Choose the owning rank of each stack, so that the ranks' work is about even; the same answer on every rank."""
    loads = [0] * num_ranks
    owners = [0] * len(stacks)
    costs = [stack.count * cost(stack.shape) for stack in stacks]
    for number in sorted(range(len(stacks)), key=lambda number: -costs[number]):
        owners[number] = min(range(num_ranks), key=loads.__getitem__)
        loads[owners[number]] += costs[number]
    return owners


class MatrixExchange:
    """Brings the updates of parts that are stepped together to the owners of their matrices, and results back.

    Updates of a rank are one flat tensor, its parts one after the other. Every data rank must call the methods.
    """

    def __init__(self, parts: Sequence[Part], stacks: Iterable[MatrixStack]) -> None:
        first = parts[0]
        self.group, self.is_replicated = first.data_group, first.replicated
        self.num_ranks, self.rank = len(first.data_ranks), first.data_ranks.index(_global_rank())
        self.is_local = self.is_replicated or self.num_ranks == 1
        held = [list(_joined_spans(parts, rank)) for rank in range(1 if self.is_local else self.num_ranks)]
        names = {span.name for spans in held for span in spans}
        inside = [stack for stack in stacks if stack.name in names]
        owners = deal_owners(inside, self.num_ranks)
        owned = [[stack for stack, owner in zip(inside, owners) if owner == rank] for rank in range(self.num_ranks)]
        self.stacks = owned[self.rank]
        own = held[0] if self.is_local else held[self.rank]
        # What this rank sends to every owner, and what it gets as an owner from every rank.
        self.sent = [_overlaps(own, stacks) for stacks in owned]
        self.received = [] if self.is_local else [_overlaps(spans, self.stacks) for spans in held]
        self.owned_numel = [sum(stack.numel for stack in stacks) for stacks in owned]
        arriving = self.sent[self.rank] if self.is_local else [each for overlaps in self.received for each in overlaps]
        found, wanted = sum(each.numel for each in arriving), self.owned_numel[self.rank]
        assert found == wanted, f"the data ranks hold {found} of {wanted} values of the matrices of rank {self.rank}"
        # Where each of this rank's stacks begins in what `to_owners` returns.
        ends = accumulate(stack.numel for stack in self.stacks)
        self.places = [end - stack.numel for end, stack in zip(ends, self.stacks)]
        if self.is_local:
            self.places = [overlap.place for overlap in self.sent[self.rank]]

    def to_owners(self, updates: Tensor) -> Tensor:
        """Bring the updates of the matrices that this rank owns here, each whole from its place on; to be overwritten."""
        if self.is_local:
            return updates
        owned = updates.new_empty(self.owned_numel[self.rank])
        sent = join([_range(updates, overlap) for overlaps in self.sent for overlap in overlaps], updates)
        received = _all_to_all(sent, _sizes(self.sent), _sizes(self.received), self.group)
        arrived = [each for overlaps in self.received for each in overlaps]
        _scatter(received, arrived, [owned[each.owned : each.owned + each.numel] for each in arrived])
        return owned

    def to_ranges(self, owned: Tensor, updates: Tensor) -> None:
        """Bring the owners' results back over the updates of all ranks, in place."""
        if self.num_ranks == 1:
            return
        if self.is_replicated:
            longest = max(self.owned_numel)
            own = [_range(updates, overlap) for overlap in self.sent[self.rank]]
            padded = torch.cat([*own, updates.new_zeros(longest - self.owned_numel[self.rank])])
            gathered = updates.new_empty(self.num_ranks * longest)
            torch.distributed.all_gather_into_tensor(gathered, padded, group=self.group)
            results = gathered.split(longest)
            returned = torch.cat([result[:numel] for result, numel in zip(results, self.owned_numel)])
        else:
            parts = [owned[each.owned : each.owned + each.numel] for overlaps in self.received for each in overlaps]
            returned = _all_to_all(join(parts, owned), _sizes(self.received), _sizes(self.sent), self.group)
        arrived = [each for overlaps in self.sent for each in overlaps]
        _scatter(returned, arrived, [_range(updates, each) for each in arrived])


def alike_batches(exchange: MatrixExchange) -> Iterator[list[tuple[MatrixStack, int]]]:
    """Yield this rank's stacks, with their places, in batches of those that are alike and worth computing together."""
    alike: dict[tuple[Any, ...], list[tuple[MatrixStack, int]]] = {}
    for stack, place in zip(exchange.stacks, exchange.places, strict=True):
        alike.setdefault((stack.count, stack.rows, stack.columns, stack.cut), []).append((stack, place))
    for members in alike.values():
        size = max(1, BATCH_ELEMENTS // members[0][0].numel)
        for first in range(0, len(members), size):
            yield members[first : first + size]


def _global_rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _joined_spans(parts: Sequence[Part], rank: int) -> Iterator[Span]:
    """The ranges of a data rank, with places among all its updates."""
    offset = 0
    for part in parts:
        for span in part.spans_of(rank):
            yield Span(span.name, span.start, span.numel, offset + span.flat_start)
        offset += part.master.numel()


def _overlaps(spans: Sequence[Span], stacks: Sequence[MatrixStack]) -> list[Overlap]:
    """Find what of these stacks is in these ranges, in the order of the stacks."""
    by_name: dict[str, list[Span]] = {}
    for span in spans:
        by_name.setdefault(span.name, []).append(span)
    found, owned = [], 0
    for stack in stacks:
        for span in by_name.get(stack.name, ()):
            low, high = max(span.start, stack.start), min(span.start + span.numel, stack.start + stack.numel)
            if low < high:
                found.append(Overlap(span.flat_start + low - span.start, owned + low - stack.start, high - low))
        owned += stack.numel
    return found


def _range(updates: Tensor, overlap: Overlap) -> Tensor:
    return updates[overlap.place : overlap.place + overlap.numel]


def _sizes(overlaps: Sequence[Sequence[Overlap]]) -> list[int]:
    """Numbers that go to, or come from, each rank."""
    return [sum(each.numel for each in of_rank) for of_rank in overlaps]


def _scatter(message: Tensor, overlaps: Sequence[Overlap], places: list[Tensor]) -> None:
    """Copy a message's ranges to their places."""
    if places:
        torch._foreach_copy_(places, list(message.split([each.numel for each in overlaps])))


def join(pieces: list[Tensor], like: Tensor) -> Tensor:
    """Join flat tensors; a single one is not copied, and none give an empty tensor of the same dtype."""
    if not pieces:
        return like.new_empty(0)
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _all_to_all(sent: Tensor, sizes: list[int], received_sizes: list[int], group: Any) -> Tensor:
    """Send this many numbers of a message to each rank; what all of them sent here, in rank order."""
    received = sent.new_empty(sum(received_sizes))
    torch.distributed.all_to_all_single(received, sent, received_sizes, sizes, group=group)
    return received
