"""A CUDA graph's rules on a CPU: a list of operations that is run again on the tensors that it was recorded with.

What PyTorch dispatches is recorded: operations of its own, and ours whole. Python is not run again. A result is written where
the result of the recorded run is, so that whoever reads another place reads what was there before. A number that is read
from a tensor ends a recording, as it does a capture. Collectives are run again too, with the other ranks' replays, and waited for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import Work
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Kernels ask only on a CPU whether there is a boundary at all; what they do if there is one is right if there is none.
ALONE_ON_CPU = "drop_single_document"
# Gloo copies a result out of its own memory when it is waited for. A replay waits too: recorded, the copy would bring the old one.
WAITING = {"reduce_scatter_tensor"}
READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal")


class HostRead(RuntimeError):
    """A number was read from a tensor while a graph was recorded."""


class Recorder(TorchDispatchMode):
    """Records operations with the tensors that they were given and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.plan: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor | None] | None]] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note it."""
        if func._schema.name.replace("::", ".") in READS and ALONE_ON_CPU not in functions_above():
            raise HostRead(f"{func} reads a number of the device")
        made = func(*args, **(kwargs or {}))
        if func.namespace != "c10d" and not WAITING.isdisjoint(functions_above()):
            return made
        self.calls.append((func, args, kwargs or {}, made))
        return made

    @torch.no_grad()
    def replay(self) -> None:
        """Run what was recorded again, on the same memory."""
        if self.plan is None:
            self.plan = [
                (func, args, kwargs, places_of(*call)) for call in self.calls for func, args, kwargs, _ in [call]
            ]
        for func, args, kwargs, places in self.plan:
            if places is None:
                continue
            made = func(*args, **kwargs)
            if func.namespace == "c10d":
                wait(made)
            elif places:
                for place, result in zip(places, tensors_of(made), strict=True):
                    if place is not None:
                        place.copy_(result)


def places_of(func: Any, args: Any, kwargs: Any, made: Any) -> list[Tensor | None] | None:
    """For each result, where it is written to in a replay, None where its memory was an argument's; None for a view, which sees it."""
    if func.namespace == "c10d":
        return []
    memory, results = {tensor.untyped_storage().data_ptr() for tensor in tensors_of((args, kwargs))}, tensors_of(made)
    places = [None if place.untyped_storage().data_ptr() in memory else place for place in results]
    if results and all(place is None for place in places):
        return [] if func._schema.is_mutable else None
    return places


def wait(made: Any) -> None:
    """Wait for what a collective gave: its work, or tensors and its work."""
    works = [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.ScriptObject)]
    for work in works:
        Work.unbox(work).wait()


def functions_above() -> Iterator[str]:
    """Names of the functions that are being called."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def record(run: Callable[[], None]) -> Callable[[], None]:
    """What `CudaCapture` does on a GPU, but that recording computes too."""
    recorder = Recorder()
    with recorder:
        run()
    return recorder.replay
