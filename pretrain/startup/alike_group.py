"""Process groups that answer on their own: every other rank is taken to send what this one sends.

A rank that runs a block on its own, before the first step, gets from its collectives tensors of the right shapes at
once. An all-gather repeats this rank's tensor, an all-to-all brings the part meant for this rank once from each, sums
stay what they are. So counts that ranks exchange agree with the rows that follow them. It is an own backend of
torch.distributed (`Backend.register_backend`), because everything that communicates, Megatron-core too, then needs no
change.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future

from amfm.model.parallel.groups import ProcessGroupCollection

BACKEND = "amfm_alike"
# The axes that blocks communicate over. Every rank has each of them, so all ranks make as many groups.
AXES_OF_BLOCKS = ("tp", "cp", "ep", "expt_tp")


def alike_groups(groups: ProcessGroupCollection) -> ProcessGroupCollection:
    """The groups of a layout, with those that blocks communicate over replaced by ones that answer on their own.

    Every rank must call this, for torch numbers its groups; nothing is sent. `destroy` them when they are no longer needed.
    """
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _make, devices=["cpu", "cuda"])
    own = copy.copy(groups)
    for axis in AXES_OF_BLOCKS:
        group = getattr(groups, axis)
        if group.size() > 1:
            ranks = dist.get_process_group_ranks(group)
            setattr(own, axis, dist.new_group(ranks, backend=BACKEND, use_local_synchronization=True))
    return own


def destroy(groups: ProcessGroupCollection) -> None:
    """Let go of the groups that `alike_groups` made."""
    for axis in AXES_OF_BLOCKS:
        group = getattr(groups, axis)
        if isinstance(group, AlikeGroup):
            dist.destroy_process_group(group)


def _make(store: Any, rank: int, size: int, timeout: timedelta) -> AlikeGroup:
    """What torch.distributed calls for a new group of this backend."""
    return AlikeGroup(rank, size)


_ProcessGroup: Any = dist.ProcessGroup  # whose stubs are of the newest release


class AlikeGroup(_ProcessGroup):
    """A group whose collectives are copies on this rank; torch's releases name some of them differently."""

    _name = ""

    def _set_group_name(self, name: str) -> None:
        super()._set_group_name(name)
        self._name = name

    @property
    def group_name(self) -> str:
        """The name under which torch.distributed knows it."""
        return self._name

    def allreduce(self, tensors: Sequence[Tensor], *_: Any) -> Any:
        """Leave the tensors as they are."""
        return _done(tensors)

    def broadcast(self, tensors: Sequence[Tensor], *_: Any) -> Any:
        """Leave the tensors as they are."""
        return _done(tensors)

    def allgather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], *_: Any) -> Any:
        """Copy the input to each output."""
        for output in outputs[0]:
            output.copy_(inputs[0])
        return _done(outputs[0])

    def all_gather_single(self, output: Tensor, given: Tensor, *_: Any) -> Any:
        """Repeat the input."""
        output.view(self.size(), -1).copy_(given.reshape(1, -1).expand(self.size(), -1))
        return _done([output])

    def reduce_scatter_single(self, output: Tensor, given: Tensor, *_: Any) -> Any:
        """Keep this rank's part."""
        output.view(-1).copy_(given.reshape(self.size(), -1)[self.rank()])
        return _done([output])

    def all_to_all_single(
        self, output: Tensor, given: Tensor, received: Sequence[int], sent: Sequence[int], *_: Any
    ) -> Any:
        """Bring the part for this rank once from each; zeros if a rank that sends less to itself is to send more."""
        ranks = self.size()
        own = given.split(list(sent) or [len(given) // ranks] * ranks)[self.rank()]
        for part in output.split(list(received) or [len(output) // ranks] * ranks):
            rows = min(len(part), len(own))
            part[:rows].copy_(own[:rows])
            part[rows:].zero_()
        return _done([output])

    # As torch before 2.14 calls them.
    _allgather_base: Any = all_gather_single
    _reduce_scatter_base: Any = reduce_scatter_single
    alltoall_base: Any = all_to_all_single

    def barrier(self, *_: Any) -> Any:
        """Wait for no one."""
        return _done([])


def _done(tensors: Sequence[Tensor]) -> Any:
    """The work of a collective that is over."""
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(list(tensors))
    return _create_work_from_future(future)
