"""Everything of other libraries that a simulated rank replaces, each with its reason; no other file replaces anything.

It works by private names of torch, so it is written for the releases of torch that examples/simulate/amfm_simulate/trace.py names.
C++ (autograd's engine, composite operations) takes a fake CUDA tensor for one of the meta device below it, while Python
and FakeTensorMode see the GPU; what C++ then asks of "meta" the tracer turns back (tracer.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# torch.compile's machinery reads signatures of what is replaced below when it is first imported.
import torch._dynamo
import triton
from torch._C._distributed_c10d import FakeWork
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from amfm_simulate.gpu import SimulatedGpu, always


@dataclass(frozen=True)
class Patch:
    """One replaced attribute: its name, and why it is replaced."""

    target: str
    reason: str


INSTALLED: list[Patch] = []


def replace(owner: Any, name: str, value: Any, reason: str) -> None:
    """Set `owner.name` to `value` for the rest of the process and record why."""
    INSTALLED.append(Patch(f"{getattr(owner, '__name__', type(owner).__name__)}.{name}", reason))
    setattr(owner, name, value)


def install(
    gpu: SimulatedGpu, note_launch: Callable[[Any, Any, Any, Any], None], read_list: Callable[[FakeTensor], list[Any]]
) -> None:
    """Replace what has to be replaced before DeepSpeed is imported.

    `note_launch` is called with each launched Triton kernel, its grid and its arguments; `read_list` answers `Tensor.tolist`.
    """
    os.environ["DS_ACCELERATOR"] = "cuda"
    for name, answer in gpu.answers().items():
        replace(torch.cuda, name, answer, "there is no GPU: ask the simulated one")
    for name in ("range_push", "range_pop"):
        replace(torch.cuda.nvtx, name, always(None), "marks for a profiler of a GPU")
    install_fake_tensors()

    def tolist(tensor: FakeTensor) -> list[Any]:
        return read_list(tensor)

    replace(FakeTensor, "tolist", tolist, "one wait for all numbers, not one for each")
    replace(
        triton.runtime.jit.JITFunction,
        "__getitem__",
        lambda kernel, grid: lambda *arguments, **named: note_launch(kernel, grid, arguments, named),
        "a launch is counted and computes nothing: its results were allocated before it",
    )


def install_fake_tensors() -> None:
    """Let fake CUDA tensors pass where torch would touch a device, and through autograd without a GPU.

    Changes torch for the whole process, so only a separate process may call it.
    """
    replace(fake_tensor, "init_gpu_context", always(None), "allocates a real tensor on the GPU")
    replace(FakeTensorMode, "avoid_device_init", property(lambda _: True), "asks torch.cuda, which states yes here")
    replace(FakeTensor, "record_stream", always(None), "no allocator waits for a stream here")
    replace(
        torch.nn.Module,
        "_apply",
        apply_to_module,
        "torch swaps fake parameters instead of setting their data as it does for real ones, and DeepSpeed's references "
        "to them would go stale",
    )
    make_subclass = torch.Tensor._make_subclass

    def make_without_cuda(cls: type, data: torch.Tensor, requires_grad: bool = False, **settings: Any) -> torch.Tensor:
        device = settings.get("device_for_backend_keys")
        if issubclass(cls, FakeTensor) and device is not None and torch.device(device).type == "cuda":
            settings["dispatch_device"] = False
        return make_subclass(cls, data, requires_grad, **settings)

    replace(
        torch.Tensor,
        "_make_subclass",
        staticmethod(make_without_cuda),
        "autograd asks the driver for the GPU of tensors whose device is CUDA, and a build without CUDA rejects them",
    )
    replace(FakeTensor, "to", move_fake, "C++ would think that it moves from the meta device")


def move_fake(tensor: Any, *args: Any, **keywords: Any) -> Any:
    """`Tensor.to` for a fake tensor, in which a move to the GPU where it already is is not a move."""
    if tensor.fake_device.type != "cuda":
        return torch.Tensor.to(tensor, *args, **keywords)
    copy = keywords.pop("copy", False)
    other = args[0] if args and isinstance(args[0], torch.Tensor) else keywords.pop("other", None)
    if other is not None:
        device, dtype, non_blocking, layout = other.device, other.dtype, False, None
    else:
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **keywords)
    if device is not None and device.type == "cuda" and device.index in (None, tensor.fake_device.index):
        device = None
    extra: dict[str, Any] = {} if layout is None else {"memory_format": layout}
    if device is None:
        return torch.Tensor.to(tensor, dtype or tensor.dtype, copy=copy, **extra)
    return torch.Tensor.to(tensor, device, dtype or tensor.dtype, non_blocking, copy, **extra)


def apply_to_module(module: Any, change: Callable[[Any], Any], recurse: bool = True) -> Any:
    """`nn.Module._apply` as torch does it for real tensors: parameters stay the same objects with new data."""
    if recurse:
        for child in module.children():
            child._apply(change)
    for parameter in module._parameters.values():
        if parameter is not None:
            with torch.no_grad():
                changed = change(parameter)
            if changed is not parameter:
                parameter.data = changed
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module


def install_deepspeed(index: int) -> None:
    """Replace what DeepSpeed asks of its accelerator and of other ranks; `index` is this rank's device number."""
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
    from deepspeed.runtime.zero import partitioned_param_coordinator

    reason = "DeepSpeed wants the GPU's number where torch.cuda.current_device gives a device"
    replace(CUDA_Accelerator, "current_device_name", lambda _: f"cuda:{index}", reason)
    replace(CUDA_Accelerator, "current_device", lambda _: index, reason)
    replace(
        partitioned_param_coordinator,
        "assert_ints_same_as_other_ranks",
        always(None),
        "compares with numbers that rank 0 would have sent",
    )


def install_works(note_work: Callable[[int], None]) -> None:
    """Let waits for exchanges be told by the exchange's number; 0 is of none, and sends that torch joined have none."""

    def wait(work: Any, *_: Any) -> bool:
        if work.seq_id > 0:
            note_work(work.seq_id)
        return True

    replace(FakeWork, "wait", wait, "an exchange is over at once, and a timeline asks who would have waited for it")
