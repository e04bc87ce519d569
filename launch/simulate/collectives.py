"""What a collective brings to a simulated rank, where the host will ask: what every rank would send that holds the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from launch.bench.count_collectives import group_of
from launch.simulate.values import KnownValues, leaves, real_tensors


def fill_received(operator: str, args: Sequence[Any], values: KnownValues) -> None:
    """After a collective: learn what its outputs hold, or forget what they held."""
    if operator == "allreduce_":
        # As a sum; of maxima the host asks only for signals and faults, which are 0.
        for tensor in leaves(args[0]):
            known = values.of(tensor)
            if known is not None:
                with real_tensors():
                    known.mul_(group_of(args).size())
        return
    if operator == "_allgather_base_":
        _learn(
            values, args[0], values.of(args[1]), lambda own: own.repeat(group_of(args).size(), *[1] * (own.dim() - 1))
        )
    elif operator == "alltoall_base_" and not args[3] and not args[4]:
        group = group_of(args)
        _learn(values, args[0], values.of(args[1]), lambda own: from_equals(own, group.rank(), group.size()))
    elif operator not in ("broadcast_", "send", "barrier"):
        for tensor in leaves(args[0]):
            values.forget(tensor)


def from_equals(own: Tensor, rank: int, size: int) -> Tensor:
    """What an all-to-all brings when every rank sends what this one does: the part meant for this rank, from each."""
    return own.chunk(size)[rank].repeat(size, *[1] * (own.dim() - 1))


def _learn(values: KnownValues, output: Tensor, own: Tensor | None, arrange: Any) -> None:
    if own is None or output.is_floating_point():
        values.forget(output)
        return
    with real_tensors():
        received = arrange(own).view(output.shape)
    values.learn(output, received)
