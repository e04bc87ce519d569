"""Gradients that are sent while others are computed: under ZeRO 1 and 2 a parameter group is a bucket.

DeepSpeed cuts the flat weights of each parameter group over the ranks that share them, and steps its own range of each. So
with one group for some blocks (`group_parameters`), a reduce-scatter of that group's gradients leaves every rank exactly
what it steps, and can start as soon as the last backward pass has left those blocks:

    product of a weight      adds the weight's gradient to one float32 sum a group (kernels/common/weight_gradients.py)
    hook of a parameter      learns that a pass has; what autograd was given it adds itself, and frees it
    last gradient in         the group's reduce-scatter starts, while earlier blocks are still differentiated. ZeRO 2 starts
                             one after every micro-batch and keeps only this rank's range
    close                    what is summed over other ranks first (norms, routers, tied embeddings: groups of their own)
                             follows; then all are awaited, and DeepSpeed gets them as its averaged gradients
    step                     DeepSpeed clips and steps; the gathers of new weights start, and each is awaited where the
                             next forward pass first uses its weights (`wait_for`)

Reductions start in one order on all ranks, that of the backward pass: a group that is ready early waits for those before it.
DeepSpeed keeps master weights, moments, clipping, the step and the fragments of checkpoints; its own reduction is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from amfm.model.parallel.waits import waiting
from amfm.pretrain.engine.gradients import GradientFault
from amfm.pretrain.engine.optimizer import part_of
from amfm.pretrain.parallel import set_deepspeed_accelerator

set_deepspeed_accelerator()

from deepspeed.runtime.zero import stage_1_and_2  # noqa: E402
from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup  # noqa: E402


@dataclass
class Bucket:
    """One parameter group: where its parameters are in the flat sum, and how far its reduction is.

    `places`: of its parameters in the module's order.
    `is_partial`: its gradients are summed over other ranks before those that share the weights. `wanted`: hooks that fire
    until the group is complete. `sums`: the float32 sum of what was not reduced yet. `filled`: parameters whose place in it holds
    something, by number. `landed`: those that a product has added to in a pass whose hook did not fire yet, and what it made
    next to the sum. `kept`: the sum of every step, where it stays. `share`: this rank's reduced range.
    """

    index: int
    names: list[str]
    parameters: list[nn.Parameter]
    offsets: list[int]
    flat_size: int
    group: torch.distributed.ProcessGroup
    is_partial: bool
    places: list[int]
    seen: int = 0
    wanted: int = 0
    sums: Tensor | None = None
    kept: Tensor | None = None
    filled: set[int] = field(default_factory=set)
    landed: dict[int, Tensor | None] = field(default_factory=dict)
    share: Tensor | None = None
    running: list[tuple[Any, Tensor, Tensor]] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)

    @property
    def first(self) -> int:
        """Place of its first parameter in the module's order: the last one that a backward pass comes to."""
        return min(self.places)

    def view(self, number: int) -> Tensor:
        """The place of its parameter of that number in the sum, whatever is there."""
        parameter = self.parameters[number]
        if self.sums is None:
            self.filled.clear()
            self.sums = torch.empty(self.flat_size, dtype=torch.float32, device=parameter.device)
            self.sums[self.offsets[-1] + self.parameters[-1].numel() :].zero_()  # after the last parameter
        start = self.offsets[number]
        return self.sums[start : start + parameter.numel()].view(parameter.shape)

    def begin_kept(self) -> None:
        """Begin a step with zeros in the sum that stays, if there is one."""
        if self.kept is not None:
            self.sums = self.kept.zero_()
            self.filled = set(range(len(self.parameters)))

    def add(self, number: int, gradient: Tensor) -> None:
        """Add a gradient to the sum; the first one is stored."""
        place = self.view(number)
        if number in self.filled:
            place.add_(gradient)
        else:
            place.copy_(gradient)
            self.filled.add(number)

    def total(self, number: int) -> Tensor:
        """The sum of a parameter's gradients, zeros if it got none."""
        place = self.view(number)
        if number not in self.filled:
            place.zero_()
            self.filled.add(number)
        return place

    def take(self, number: int) -> tuple[Tensor, bool]:
        """The place in which a product leaves a gradient, and whether it adds to what is there.

        On a CPU gradients of a pass join each other before they join the sum, as autograd has them: so layouts and ways to
        sum compare bitwise. It is a tensor next to the sum then, where the sum holds something already.
        """
        place, is_filled = self.view(number), number in self.filled
        beside = self.landed.get(number)
        if beside is not None:
            return beside, True
        if is_filled and number not in self.landed and place.device.type == "cpu":
            beside = torch.empty_like(place)
            self.landed[number] = beside
            return beside, False
        self.landed[number] = None
        self.filled.add(number)
        return place, is_filled


@dataclass(frozen=True, eq=False)
class BucketPlace:
    """The sum of one parameter, as the products that make its gradient see it (kernels/common/weight_gradients.py)."""

    buckets: GradientBuckets
    bucket: Bucket
    number: int

    def take(self) -> tuple[Tensor, bool]:
        """The place for a gradient, and whether to add to it."""
        self.buckets.prepare(self.bucket)
        return self.bucket.take(self.number)


class GradientBuckets:
    """The buckets of one ZeRO 1 or 2 optimizer, from the first backward pass of a step to the next forward pass.

    `partial`: parameters whose gradients other ranks hold parts of. `in_products`: products add to the sums; else only hooks.
    `record`: called with (event, bucket) as things happen: `reduce`, `reduced`, `gather` and `gathered`. Ranks that share
    weights must make the same calls.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Any,
        partial: Iterable[nn.Parameter],
        *,
        every_pass: bool,
        in_products: bool = True,
        record: Callable[[str, int], None] | None = None,
    ) -> None:
        self.optimizer, self.every_pass = optimizer, every_pass
        self.record = record or (lambda event, bucket: None)
        named = {id(parameter): (place, name) for place, (name, parameter) in enumerate(module.named_parameters())}
        apart = {id(parameter) for parameter in partial}
        self.buckets = [build_bucket(optimizer, index, named, apart) for index in range(len(optimizer.bit16_groups))]
        self.places = {
            id(parameter): (bucket, number)
            for bucket in self.buckets
            for number, parameter in enumerate(bucket.parameters)
        }
        # Backward passes come to the parameters of the last blocks first.
        self.order = sorted((bucket for bucket in self.buckets if not bucket.is_partial), key=lambda item: -item.first)
        self.ready: set[int] = set()
        self.next = 0
        self.is_open = False
        self.gathers: dict[int, Any] = {}
        self.parts: dict[str, set[int]] = {}
        for bucket in self.buckets:
            for name in bucket.names:
                self.parts.setdefault(part_of(name), set()).add(bucket.index)
        # DeepSpeed's own reduction must stay silent.
        for handle in optimizer._grad_acc_hooks:
            handle.remove()
        for bucket in self.buckets:
            for number, parameter in enumerate(bucket.parameters):
                parameter.register_post_accumulate_grad_hook(self.collect)
                if in_products:
                    parameter.gradient_sum = BucketPlace(self, bucket, number)  # type: ignore[attr-defined]

    def open(self, num_backwards: int) -> None:
        """Begin a step of this many backward passes."""
        self.is_open, self.next = True, 0
        self.ready.clear()
        for bucket in self.buckets:
            bucket.seen, bucket.wanted = 0, num_backwards * len(bucket.parameters)
            bucket.sums = bucket.share = None
            bucket.landed.clear()
            bucket.norms.clear()
            bucket.begin_kept()

    def keep_sums(self) -> None:
        """Give each bucket one sum for the whole run, at one address, which is added to from the first pass on.

        Before the first backward pass of a step. Of ZeRO 1: under ZeRO 2 the sum of a pass may still are sent in the next.
        """
        assert not self.every_pass, "checked: graphs are for ZeRO 1"
        for bucket in self.buckets:
            if bucket.kept is None:
                bucket.kept = torch.empty(bucket.flat_size, dtype=torch.float32, device=bucket.parameters[0].device)
            bucket.begin_kept()

    def prepare(self, bucket: Bucket) -> None:
        """Make ready for a gradient: a sum of the pass before has been sent in parallel with a forward pass, and two
        need not be there.
        """
        assert self.is_open, "a backward pass outside of ZeroEngine.accumulate"
        if bucket.sums is None:
            self._finish_sum(bucket)

    @torch.no_grad()
    def collect(self, parameter: Tensor) -> None:
        """Learn that a pass is over for a parameter: what autograd was given joins the sum, and what is complete starts.

        Neither given nor landed in the sum: a split backward pass computes it later, and calls again.
        """
        assert self.is_open, "a backward pass outside of ZeroEngine.accumulate"
        bucket, number = self.places[id(parameter)]
        if parameter.grad is None and number not in bucket.landed:
            return
        assert bucket.seen < bucket.wanted, f"{bucket.names[number]} has more gradients than there are backward passes"
        self.prepare(bucket)
        for gradient in (bucket.landed.pop(number, None), parameter.grad):
            if gradient is not None:
                bucket.add(number, gradient)
        parameter.grad = None
        bucket.seen += 1
        is_complete = bucket.seen == bucket.wanted
        if is_complete or (self.every_pass and bucket.seen % len(bucket.parameters) == 0):
            self.ready.add(bucket.index)
            self._start_ready()

    def note(self, parameter: Tensor) -> None:
        """Learn that a replayed pass has added a gradient to a parameter's sum, before the hook of the parameter fires."""
        bucket, number = self.places[id(parameter)]
        bucket.landed[number] = None

    def _start_ready(self) -> None:
        """Start the reductions whose turn it is; after the last group it is the first one's again, for the next pass."""
        while self.order and self.order[self.next].index in self.ready:
            bucket = self.order[self.next]
            self.ready.discard(bucket.index)
            self._reduce(bucket)
            if self.every_pass and len(self.order) > 1:
                # Or the sums of every bucket would be there until it comes to its next pass: of no more than one they do.
                self._finish_sum(self.order[self.next - 1])
            self.next = (self.next + 1) % len(self.order)

    def _reduce(self, bucket: Bucket) -> None:
        """Start the reduction of what a bucket has summed up; the sum stays untouched, and alive, until it is done."""
        self._finish_sum(bucket)
        totals = [bucket.total(number) for number in range(len(bucket.parameters))]
        bucket.norms.append(torch.stack(torch._foreach_norm(totals)))
        sums, bucket.sums = bucket.sums, None
        assert sums is not None
        self.record("reduce", bucket.index)
        ranks = bucket.group.size()
        if ranks == 1:
            bucket.running.append((None, sums, sums))
            return
        share = torch.empty(bucket.flat_size // ranks, dtype=torch.float32, device=sums.device)
        work = torch.distributed.reduce_scatter_tensor(share, sums, group=bucket.group, async_op=True)
        bucket.running.append((work, sums, share))

    def _finish_sum(self, bucket: Bucket) -> None:
        """Wait for a bucket's reductions and add them up."""
        for work, _, share in bucket.running:
            if work is not None:
                with waiting():
                    work.wait()
            bucket.share = share if bucket.share is None else bucket.share.add_(share)
            self.record("reduced", bucket.index)
        bucket.running.clear()

    @torch.no_grad()
    def close(
        self, sum_partial: Callable[[Callable[[nn.Parameter], Tensor]], None], *, refuse: bool
    ) -> GradientFault | None:
        """Start what is left, wait for all, and hand the ranges to DeepSpeed; returns what is wrong with this rank's own.

        `sum_partial` completes the gradients that it is given a look-up for. `refuse`: make the step one that no rank takes.
        """
        sum_partial(self.gradient_of)
        for bucket in [*self.order, *(bucket for bucket in self.buckets if bucket.is_partial)]:
            if bucket.sums is not None or not (bucket.running or bucket.share is not None):
                self._reduce(bucket)
        for bucket in self.buckets:
            self._finish_sum(bucket)
            assert bucket.share is not None, "every bucket was reduced"
            if refuse:
                bucket.share.fill_(float("inf"))
            self._hand_over(bucket.index, bucket.share)
        self.is_open = False
        fault = self._find_fault()
        for bucket in self.buckets:
            bucket.share = None
        return fault

    def gradient_of(self, parameter: nn.Parameter) -> Tensor:
        """This rank's float32 sum of a parameter's gradients, of what was not reduced yet."""
        bucket, number = self.places[id(parameter)]
        return bucket.total(number)

    def _hand_over(self, index: int, share: Tensor) -> None:
        """Give a group's range to DeepSpeed, which clips it in place and steps with it."""
        if self.optimizer.cpu_offload:
            master = self.optimizer.single_partition_of_fp32_groups[index]
            if master.grad is None:
                master.grad = torch.empty_like(master)
            master.grad.copy_(share)
        else:
            self.optimizer.averaged_gradients[index] = GradPartitionBufferGroup([share], share)

    def _find_fault(self) -> GradientFault | None:
        """Name the first parameter whose own gradient was not finite on this rank in any reduction; one wait for the device."""
        found = [torch.stack([torch.isfinite(norms) for norms in bucket.norms]).all(0) for bucket in self.buckets]
        finite = torch.cat(found).tolist()
        places = [entry for bucket in self.buckets for entry in zip(bucket.places, bucket.names)]
        faulty = sorted(entry for entry, is_finite in zip(places, finite) if not is_finite)
        return GradientFault(faulty[0][1], len(faulty)) if faulty else None

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Inside the block, around DeepSpeed's step, its gathers of new weights start here and are awaited at their first use."""
        own = stage_1_and_2.all_gather_dp_groups
        stage_1_and_2.all_gather_dp_groups = self._start_gathers
        try:
            yield
        finally:
            stage_1_and_2.all_gather_dp_groups = own

    def _start_gathers(
        self, groups_flat: Sequence[Tensor], partitioned_param_groups: Sequence[Sequence[Tensor]], **_: Any
    ) -> None:
        """Start the gathers of all groups in the order of the forward pass."""
        for bucket in sorted(self.buckets, key=lambda item: item.first):
            if bucket.group.size() > 1:
                own = partitioned_param_groups[bucket.index][bucket.group.rank()]
                self.record("gather", bucket.index)
                self.gathers[bucket.index] = torch.distributed.all_gather_into_tensor(
                    groups_flat[bucket.index], own, group=bucket.group, async_op=True
                )

    def wait_for(self, part: str) -> None:
        """Wait until the weights of one part of the module (`blocks.3`, `embedding`, `head`) are those of the last step."""
        for index in self.parts.get(part, ()):
            self._wait(index)

    def wait_for_all(self) -> None:
        """Wait until all weights are those of the last step."""
        for index in list(self.gathers):
            self._wait(index)

    def _wait(self, index: int) -> None:
        if index in self.gathers:
            with waiting():
                self.gathers.pop(index).wait()
            self.record("gathered", index)


def build_bucket(optimizer: Any, index: int, named: dict[int, tuple[int, str]], apart: set[int]) -> Bucket:
    """Read off DeepSpeed's optimizer what one of its parameter groups holds, and where in its flat weights."""
    members, flat = optimizer.bit16_groups[index], optimizer.bit16_groups_flat[index]
    offsets = [0, *accumulate(parameter.numel() for parameter in members)]
    for parameter, start in zip(members, offsets):
        here = parameter.data.storage_offset() - flat.storage_offset()
        assert here == start, "DeepSpeed keeps the weights of a group in one tensor, one after the other"
    return Bucket(
        index,
        [named[id(parameter)][1] for parameter in members],
        list(members),
        offsets[:-1],
        flat.numel(),
        optimizer.real_dp_process_group[index],
        any(id(parameter) in apart for parameter in members),
        [named[id(parameter)][0] for parameter in members],
    )
