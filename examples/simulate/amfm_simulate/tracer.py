"""Dispatch mode that records every operation of a simulated rank: allocations, FLOPs, traffic and host waits.

How it works: the mode stands above FakeTensorMode and sees each operation that reaches the dispatcher, from Python or
from autograd's C++. It runs the operation on fake tensors, then tells the meters: `gpu.py` new storages, `flops.py`
products, `count_collectives` what is sent, and `events.py`, where a timeline is asked for, all of it in order. The host's control flow depends on a few integers (rows for each expert
rank, documents), so `values.py` carries those along on the CPU; other numbers that Python asks for get a harmless
answer. A mode rather than a profiler, because without a device there is nothing to profile.

Results of collectives in a simulated rank, for the few integer tensors that the host will read.

How it works: there are no other ranks, so each is assumed to send what this one sends. Then a gather repeats the own
tensor, a sum multiplies it by the group's size, and an evenly split all-to-all brings the part meant for this rank once
from each. That is enough to know how many rows arrive. A broadcast keeps the own values; results of other collectives
become unknown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor
from torch.distributed._tools.fake_collectives import CollectiveOp
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from amfm.launch.plan.blocks.measured import lacks_fake
from amfm.launch.plan.flops import count_flops
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm_simulate.capture import CaptureCheck
from amfm_simulate.compiled import BodyRunner, CompiledKernels
from amfm_simulate.count_collectives import CommunicationCounter, group_of
from amfm_simulate.events import EventLog
from amfm_simulate.gpu import MemoryMeter
from amfm_simulate.place import OUTSIDE, BlockTracker, current_line
from amfm_simulate.values import KnownValues, leaves, real_tensors


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


aten = torch.ops.aten
# Functions whose question to the device is answered with no: "is anything wrong?"
DENIED = ("overflow", "invalid", "nan", "inf")
PASSES = ("forward", "backward")
# Operations that torch would take apart for fake tensors, into some that C++ makes on another device, or as a CPU does it:
# what the GPU's own operation gives.
AS_ON_A_CARD: dict[Any, Callable[..., Any]] = {
    aten.log_sigmoid_forward.default: lambda x: (torch.empty_like(x), x.new_empty(0)),
    aten.log_sigmoid_backward.default: lambda gradient, x, _: torch.empty_like(x),
}


@dataclass
class Tally:
    """Counts of one step: by kind of block, launches also by pass, host waits by line."""

    flops: Counter[str] = field(default_factory=Counter)
    triton_launches: Counter[str] = field(default_factory=Counter)
    other_launches: Counter[str] = field(default_factory=Counter)
    launches_by_pass: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in PASSES})
    host_waits: Counter[str] = field(default_factory=Counter)


class Tracer(TorchDispatchMode):
    """Dispatch mode above FakeTensorMode that runs and records operations. `device` is the simulated GPU."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.memory, self.values, self.blocks = MemoryMeter(), KnownValues(), BlockTracker(self._note_given)
        self.bodies, self.compiled, self.capture = BodyRunner(), CompiledKernels(), CaptureCheck()
        self.given: dict[int, set[int]] = {}  # numbers of allocations by the pass of a block that is given them
        self.operations = 0
        self.meant_meta = 0
        self.base_phase = "build"
        self.tally = Tally()
        self.log: EventLog | None = None

    def watch(self, groups: ProcessGroupCollection) -> None:
        """Learn the process groups, whose axes traffic is counted by; call before the first operation."""
        self.groups = groups
        self.values.expert_ranks = groups.ep.size()
        self.begin_step()

    def begin_step(self) -> None:
        """Reset all counts of a step."""
        self.tally = Tally()
        self.traffic = {when: CommunicationCounter(self.groups) for when in ("passes", "once a step")}
        self.blocks.forget_passes()
        self.given.clear()
        if self.log is not None:
            self.log.events = []

    def record_events(self) -> None:
        """From now on list what happens in a step, for a timeline; call after `watch`."""
        self.log = EventLog(self.traffic["passes"].axis_of)

    def note_work(self, number: int) -> None:
        """Note that the current stream waits for an exchange."""
        if self.log is not None:
            self.log.wait(number)

    def enter(self, phase: str) -> None:
        """Start a phase as the run names it; the tracer itself tells backward from forward."""
        self.base_phase = phase
        self.memory.enter(phase)

    def note_launch(self, kernel: Any, grid: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Count a launch of a Triton kernel for the current block, and note what a GPU would compile and capture of
        it.
        """
        self._note_launch(self.tally.triton_launches)
        self._note_captured(kernel.fn.__name__, (grid, *arguments, *named.values()))
        self.compiled.launch(kernel, arguments, named)

    def _note_launch(self, launches: Counter[str]) -> None:
        """Count a launch among those of its sort, and of the pass that it is part of, for the current block."""
        kind, _ = self.blocks.current()
        launches[kind] += 1
        self.tally.launches_by_pass["backward" if self.blocks.is_backward() else "forward"][kind] += 1

    def _note_captured(self, name: str, given: tuple[Any, ...], results: Any = ()) -> None:
        """Note what a graph of the current block would hold of a launch; outside of blocks there are none."""
        kind, number = self.blocks.current()
        if kind != OUTSIDE:
            self.capture.launch(kind, self._direction(), name, given, results, partial(self._other_memory, number))

    def _other_memory(self, number: int, tensor: Tensor) -> str:
        """Which memory a tensor is in, of one that this pass of a block neither makes nor is given; else nothing."""
        found = self.memory.find(tensor)
        if found is None or found.made_in == number or found.number in self.given.get(number, ()):
            return ""
        return f" in memory {found.number}+{tensor.storage_offset()} of {found.line}"

    def _note_given(self, number: int, tensor: Tensor) -> None:
        found = self.memory.find(tensor)
        if found is not None:
            self.given.setdefault(number, set()).add(found.number)

    def _direction(self) -> str:
        return "backward" if self.blocks.is_backward() else "forward"

    def note_wait(self, what: str) -> None:
        """Count a point where the host waits for the GPU, under its source line."""
        line = f"{current_line()}: {what}"
        self.tally.host_waits[line] += 1
        self.capture.read(self.blocks.current()[0], self._direction(), line)
        if self.log is not None:
            self.log.host(line)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation on fake tensors and record what it did."""
        kwargs = dict(kwargs or {})
        self.operations += 1
        self._enter_phase()
        asked = kwargs.get("device")
        if asked is not None and asked.type == "meta" and not self.meant_meta:
            kwargs["device"] = self.device  # what C++ sees below a fake CUDA tensor
        if func is aten._pin_memory.default:
            func, args, kwargs = aten.clone.default, args[:1], {}  # fake tensors know no pinned memory
        if func is aten._local_scalar_dense.default:
            return self._answer_scalar(args[0])
        if func.namespace == "c10d":
            return self._communicate(func, args, kwargs)
        try:
            is_ours = func.namespace == "amfm"
            out = self.bodies.run(func, args, kwargs, self) if is_ours else self._run(func, args, kwargs)
        except RuntimeError as error:
            if not lacks_fake(error):
                raise
            raise ValueError(
                f"--trace: the operation {func} ({current_line()}) has no fake function: register one with "
                "`register_fake`, as operations in kernels/ do, or plan without --trace"
            ) from error
        self.memory.track(out, self.operations, self.blocks.current()[1])
        self.values.follow(func, args, kwargs, out)
        self.values.assume(func, args, out)
        self._count(func, args, kwargs, out)
        return out

    def _enter_phase(self) -> None:
        """Tell backward from forward passes, which both run in the run's phase `forward`."""
        if self.base_phase == "forward":
            phase = "backward" if self.blocks.is_backward() else "forward"
            if phase != self.memory.phase:
                self.memory.enter(phase)

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run one operation; where its size depends on values, take it from the known values.

        Raises RuntimeError without them.
        """
        if func in AS_ON_A_CARD:
            return AS_ON_A_CARD[func](*args, **kwargs)
        try:
            return func(*args, **kwargs)
        except DynamicOutputShapeException:
            found = self.values.compute(func, args, kwargs)
            if found is None:
                raise RuntimeError(
                    f"{current_line()}: {func} gives a tensor whose size only the device knows, and the simulated rank does "
                    "not know its input"
                ) from None
            device = next(leaves((args, kwargs))).device
            if device.type == "cuda":
                self.note_wait(f"size of {func._opname}")
            return torch.empty(found.shape, dtype=found.dtype, device=device)

    def _answer_scalar(self, tensor: Tensor) -> Any:
        """The number that Python reads from a tensor: its known value, else a harmless one.

        Unknown flags are answered yes, except by functions that ask whether something is wrong.
        """
        if isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda":
            self.note_wait("a number of the device")
        known = self.values.read(tensor)
        if known is not None:
            while isinstance(known, list):
                (known,) = known
            return known
        line = current_line().rpartition(" ")[2]
        value = not any(word in line for word in DENIED)
        if tensor.dtype == torch.bool:
            return value
        return float(value) if tensor.dtype.is_floating_point else int(value)

    def read_list(self, tensor: FakeTensor) -> list[Any]:
        """`Tensor.tolist`: known values or zeros, and one host wait for all of them."""
        if tensor.fake_device.type == "cuda":
            self.note_wait("numbers of the device")
        known = self.values.read(tensor)
        if known is None:  # of losses and what was summed together with them: only the log reads those
            with real_tensors():
                return torch.zeros(tensor.shape).tolist()
        return known

    def _communicate(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Count a collective and answer it at once: no other rank exists."""
        when = "passes" if self.base_phase in PASSES else "once a step"
        self.traffic[when].count(func._opname, args)
        fill_received(func._opname, args, self.values)
        fake = FakeWork()
        if self.log is not None:
            fake.seq_id = self.log.exchange(func._opname, args)  # by which its wait is known (patches.py)
        work = fake.boxed()
        if func in CollectiveOp.WK:
            return work
        assert func in CollectiveOp.WK_ARG_1, f"{func} is a collective that no one has taught this tracer"
        return args[0], work

    def _count(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Count FLOPs, copies and launches of one operation for the current block."""
        kind, _ = self.blocks.current()
        flops = count_flops(func, args, kwargs, out, self.values.read)
        if flops:
            self.tally.flops[kind] += flops
        if func in (aten._to_copy.default, aten.copy_.default):
            self._note_copy(func, args, kwargs, out)
        if not computes_on_gpu(func, out):
            return
        if func.namespace != "amfm":
            self._note_launch(self.tally.other_launches)
            self._note_captured(str(func), (*args, *kwargs.values()), out)
        if self.log is not None:
            self.log.compute(func, args, kwargs, out, flops=flops, kind=kind, phase=self.memory.phase)

    def _note_copy(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Count copies between host and GPU for which the host waits.

        Copies to the host always count; of those to the GPU all but `non_blocking` ones, taken to be from pinned
        memory, and CPU scalars, which are sent with the launch.
        """
        source, target = (args[0], out) if func is aten._to_copy.default else (args[1], args[0])
        ends = (source.device.type, target.device.type)
        if ends == ("cuda", "cpu"):
            self.note_wait("copy to the host")
        elif ends == ("cpu", "cuda") and not (source.dim() == 0 and func is aten.copy_.default):
            is_pinned = bool(kwargs.get("non_blocking"))  # so it is meant; fake tensors do not know
            if not is_pinned:
                self.note_wait("copy from the host")


def computes_on_gpu(func: Any, out: Any) -> bool:
    """Whether an operation launches a kernel on the GPU: views and empty tensors do not."""
    if func.is_view or "empty" in func._opname or func._opname in ("detach", "lift_fresh", "_unsafe_view", "alias"):
        return False
    return any(tensor.device.type == "cuda" for tensor in leaves(out))


class DeviceWords(TorchFunctionMode):
    """Function mode for devices as Python names them.

    A bare number means a GPU; "meta" counts as meant only where it is written, since C++ also says it of fake CUDA
    tensors.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function with devices by name, marking calls that name the meta device."""
        kwargs = dict(kwargs or {})
        if isinstance(kwargs.get("device"), int):
            kwargs["device"] = torch.device("cuda", kwargs["device"])
        said = (kwargs.get("device"), *(entry for entry in args if isinstance(entry, (str, torch.device))))
        is_meant = any(isinstance(entry, (str, torch.device)) and str(entry) == "meta" for entry in said)
        self.tracer.meant_meta += is_meant
        try:
            return func(*args, **kwargs)
        finally:
            self.tracer.meant_meta -= is_meant
