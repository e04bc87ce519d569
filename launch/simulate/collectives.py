"""Results of collectives in a simulated rank, for the few integer tensors that the host will read.

How it works: there are no other ranks, so each is assumed to send what this one sends. Then a gather repeats the own
tensor, a sum multiplies it by the group's size, and an evenly split all-to-all brings the part meant for this rank once
from each. That is enough to know how many rows arrive. A broadcast keeps the own values; results of other collectives
become unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from amfm.launch.simulate.count_collectives import group_of
from amfm.launch.simulate.values import KnownValues, leaves, real_tensors


def fill_received(operator: str, args: Sequence[Any], values: KnownValues) -> None:
    """Update known values after a collective: set what its outputs hold, or drop what they held before."""
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
    """Result of an all-to-all in which every rank sends the same tensor: the part meant for `rank`, once from each."""
    return own.chunk(size)[rank].repeat(size, *[1] * (own.dim() - 1))


def _learn(values: KnownValues, output: Tensor, own: Tensor | None, arrange: Any) -> None:
    """Set an output's values from this rank's own input, arranged as the collective would; forget them if unknown."""
    if own is None or output.is_floating_point():
        values.forget(output)
        return
    with real_tensors():
        received = arrange(own).view(output.shape)
    values.record(output, received)
