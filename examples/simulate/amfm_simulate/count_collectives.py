"""Count the collectives of a piece of code by axis, collective and dtype, whoever calls them.

How it works: torch.distributed's functions, Megatron-core and DeepSpeed all end in operators of the namespace c10d,
which a dispatch mode sees, in backward passes too. Wrapping Python functions instead would miss what libraries call
directly. An operator that is not in the table is a failure, so that nothing goes uncounted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from amfm.model.parallel.groups import AXES, ProcessGroupCollection

# What torch.distributed's operators are called here, and which argument holds what a rank hands in.
COLLECTIVES = {
    "allreduce_": ("all_reduce", 0),
    "allgather_": ("all_gather", 1),
    "_allgather_base_": ("all_gather", 1),
    "allgather_into_tensor_coalesced_": ("all_gather", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "alltoall_": ("all_to_all", 1),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
    "send": ("send", 0),
}
SILENT = ("recv_", "recv_any_source_", "barrier", "monitored_barrier_")


@dataclass(frozen=True)
class Traffic:
    """Calls of one collective on one axis with numbers of one type.

    `handed_bytes` is what ranks give to the calls; `sent_bytes` what of it leaves them when every byte takes the
    shortest way (rings for reductions, straight to the receiver else). Of one rank, or summed over ranks.
    """

    axis: str
    collective: str
    dtype: str
    calls: int
    handed_bytes: int
    sent_bytes: int


class CommunicationCounter(TorchDispatchMode):
    """Inside its block, counts the collectives of this rank: ours, Megatron-core's and DeepSpeed's, backward passes too.

    Groups of one rank send nothing and do not count; a group that belongs to no axis of `groups` is called `other`.
    """

    def __init__(self, groups: ProcessGroupCollection) -> None:
        super().__init__()
        world = torch.distributed.group.WORLD
        assert world is not None, "collectives are counted if there is a process group"
        self.axis_of: dict[str, str] = {world.group_name: "world"}
        for axis in AXES:
            group = getattr(groups, axis, None)
            if isinstance(group, ProcessGroup):
                self.axis_of.setdefault(group.group_name, axis)
        self.counts: dict[tuple[str, str, str], Traffic] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count a collective before it runs; all other operations pass through."""
        if func.namespace == "c10d":
            self.count(func._opname, args)
        return func(*args, **(kwargs or {}))

    def count(self, operator: str, args: Sequence[Any]) -> None:
        """Count one call of an operator of `torch.ops.c10d`."""
        if operator in SILENT:
            return
        assert operator in COLLECTIVES, f"c10d.{operator} is a collective that no one has taught this counter"
        group = group_of(args)
        if group.size() == 1:
            return
        collective, position = COLLECTIVES[operator]
        tensors = list(_tensors(args[position]))
        sent = SENT[collective](tensors, group, args)
        # A broadcast is handed in only by its root; the others only receive.
        is_giver = collective != "broadcast" or sent > 0
        handed = sum(tensor.nbytes for tensor in tensors) if is_giver else 0
        axis = self.axis_of.get(group.group_name, "other")
        key = (axis, collective, str(tensors[0].dtype).removeprefix("torch."))
        before = self.counts.get(key, Traffic(*key, 0, 0, 0))
        self.counts[key] = replace(
            before,
            calls=before.calls + 1,
            handed_bytes=before.handed_bytes + handed,
            sent_bytes=before.sent_bytes + sent,
        )

    def traffic(self) -> list[Traffic]:
        """Counted traffic of this rank, sorted by axis, collective and dtype."""
        return [self.counts[key] for key in sorted(self.counts)]


def group_of(args: Sequence[Any]) -> Any:
    """The process group among the arguments of a c10d operator."""
    (group,) = (
        argument
        for argument in args
        if isinstance(argument, torch.ScriptObject) and str(argument._type()).endswith(".ProcessGroup")
    )
    return ProcessGroup.unbox(group)


def _tensors(argument: Any) -> Iterable[Tensor]:
    """Tensors of an operator's argument, which may be a list of lists."""
    if isinstance(argument, Tensor):
        yield argument
    else:
        for part in argument:
            yield from _tensors(part)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _sent_all_to_all(tensors: Sequence[Tensor], group: Any, args: Sequence[Any]) -> int:
    """Bytes that leave this rank in an all-to-all: all but its own part, by the split sizes where they are given."""
    if len(tensors) > 1:
        return _bytes(tensors) - tensors[group.rank()].nbytes
    splits: Sequence[int] = args[4]
    if not splits:
        return tensors[0].nbytes * (group.size() - 1) // group.size()
    row_bytes = tensors[0].nbytes // max(1, sum(splits))
    return (sum(splits) - splits[group.rank()]) * row_bytes


SENT: dict[str, Callable[[Sequence[Tensor], Any, Sequence[Any]], int]] = {
    "all_reduce": lambda tensors, group, args: 2 * _bytes(tensors) * (group.size() - 1) // group.size(),
    "all_gather": lambda tensors, group, args: _bytes(tensors) * (group.size() - 1),
    "reduce_scatter": lambda tensors, group, args: _bytes(tensors) * (group.size() - 1) // group.size(),
    "all_to_all": _sent_all_to_all,
    # Where the root sits is argument 2 of a broadcast, 3 of a reduction.
    "reduce": lambda tensors, group, args: _bytes(tensors) * (args[3] != group.rank()),
    "broadcast": lambda tensors, group, args: _bytes(tensors) * (group.size() - 1) * (args[2] == group.rank()),
    "send": lambda tensors, group, args: _bytes(tensors),
}
