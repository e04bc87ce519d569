"""One trial: a problem whose outputs and gradients are compared with float64.

The acceptance run on a GPU, the check at a kernel's first use and their rehearsal in the interpreter ask the same: are
all outputs and all gradients as near to float64 as PyTorch in the same dtype comes? So a trial has every tensor that
carries a gradient as a leaf, and every result that takes one as an output. Three kinds of sizes: `first` has the tiles of
production over few tokens and is what the first use checks, `small` has odd sizes, `long` is only for GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from amfm.kernels.cases.problem import Inputs, Problem

Kind = Literal["first", "small", "long"]
KINDS: tuple[Kind, ...] = ("first", "small", "long")
_SEED = 0


@dataclass(frozen=True)
class Sized:
    """A trial that is not yet made: its name, what it is for, and how to make it on a device in a dtype."""

    name: str
    kind: Kind
    build: Callable[[Inputs], Problem]

    def make(self, device: torch.device, dtype: torch.dtype) -> Problem:
        """The trial, with the same numbers in every process; the caller's random numbers stay as they are."""
        with _own_generator(device):
            return self.build(Inputs(device, dtype))


@dataclass(frozen=True)
class Call:
    """Results of one forward and backward pass: outputs, and gradients as `d_` with the leaf's name."""

    values: dict[str, Tensor]


def evaluate(trial: Problem, backend: str, dtype: torch.dtype | None = None, *, compiled: bool = False) -> Call:
    """Outputs and gradients of a trial; `dtype`: leaves are converted first. `compiled`: under torch.compile.

    Every output gets a gradient of normal numbers that 16 bits hold exactly, the same in every dtype.
    """
    leaves = {name: _leaf(leaf, dtype) for name, leaf in trial.leaves.items()}
    run = torch.compile(trial.run, dynamic=False, backend=_compiler(trial)) if compiled else trial.run
    outputs = dict(run(leaves, backend))
    carrying = {name: output for name, output in outputs.items() if output.requires_grad}
    directions = [_direction(output, place) for place, output in enumerate(carrying.values())]
    gradients = torch.autograd.grad([*carrying.values()], [*leaves.values()], directions)
    values = {name: output.detach() for name, output in outputs.items()}
    return Call(values | {f"d_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)})


def documents(inputs: Inputs, tokens: int, *lengths: int, rows: int = 1) -> Tensor:
    """Ids [rows, tokens] of documents of these lengths, the last one cut or filled up to `tokens`."""
    ids = [number for number, length in enumerate(lengths) for _ in range(length)]
    ids = (ids + [len(lengths) - 1] * tokens)[:tokens]
    return torch.tensor([ids] * rows, dtype=torch.int32, device=inputs.device)


def slices(wide: Tensor, *widths: int) -> list[Tensor]:
    """Slices of the last dimension as leaves that are apart in memory, as those of one projection do."""
    return [part.detach().requires_grad_() for part in wide.detach().split(widths, dim=-1)]


def _compiler(trial: Problem) -> str:
    """The compiler of torch.compile: on a CPU, where kernels are interpreted, only tracing."""
    return "inductor" if next(iter(trial.leaves.values())).device.type == "cuda" else "aot_eager"


def _leaf(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A separate leaf in another dtype, or in its own with its strides."""
    return (tensor.detach() if dtype is None else tensor.detach().to(dtype)).requires_grad_()


def _direction(output: Tensor, seed: int) -> Tensor:
    """Normal numbers of an output's shape that bfloat16 holds, in the output's dtype."""
    generator = torch.Generator(output.device).manual_seed(seed)
    normal = torch.randn(output.shape, generator=generator, device=output.device, dtype=torch.float32)
    return normal.bfloat16().to(output.dtype)


@contextmanager
def _own_generator(device: torch.device) -> Iterator[None]:
    """Inside, random numbers are those of one seed; afterwards they continue as if nothing had been drawn."""
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(_SEED)
        yield
