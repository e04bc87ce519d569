"""Problems of an operation: inputs, a call, the least that must move, and sizes.

Five commands ask the same about an operation: what does its kernel take on a GPU (ahead-of-time table), how near does it
come to float64, what does it move (audit in the interpreter), how fast is it on this GPU and on this CPU. Each needs inputs,
a call, the least that must move, and its own sizes. So an operation has one builder of `Problem` from sizes, and every command brings its
sizes. Nothing here needs more than torch, triton and numpy: a bare machine with a GPU can run every case. Peers that
are public kernel packages belong to a problem and are looked for when asked; transformers, on the CPU, is launch's
business.

One trial: a problem whose outputs and gradients are compared with float64.

The acceptance run on a GPU, the check at a kernel's first use and their rehearsal in the interpreter ask the same: are
all outputs and all gradients as near to float64 as PyTorch in the same dtype comes? So a trial has every tensor that
carries a gradient as a leaf, and every result that takes one as an output. Three kinds of sizes: `first` has the tiles of
production over few tokens and is what the first use checks, `small` has odd sizes, `long` is only for GPUs.

An operation's case: `case.py` in its folder has one as `CASE`, and commands that speak of every kernel find it there.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Compute = Callable[..., Tensor]
EPSILON = 1e-5


class Minimum(NamedTuple):
    """What a pass must do at least: bytes moved between memory and chip, floating-point operations."""

    bytes: int
    operations: int


NOTHING = Minimum(0, 0)


def each_pass(least: Callable[[bool], Minimum]) -> tuple[Minimum, Minimum]:
    """What forward and backward must do, of a function of whether it is the backward one."""
    return least(False), least(True)


@dataclass(frozen=True)
class Inputs:
    """Makes leaves (tensors that get gradients) on one device, in one dtype unless another is named."""

    device: torch.device
    dtype: torch.dtype

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers times `scale`."""
        values = torch.randn(*shape, device=self.device) * scale
        return values.to(dtype or self.dtype).requires_grad_()

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Float32 numbers between two bounds, as gates and weights are."""
        return (low + (high - low) * torch.rand(*shape, device=self.device)).requires_grad_()

    def directions(self, *shape: int) -> Tensor:
        """Vectors of length 1 along the last dimension, as keys of delta rules are."""
        return torch.nn.functional.normalize(torch.randn(*shape, device=self.device), dim=-1).to(self.dtype)


def bfloat16_inputs() -> Inputs:
    """Inputs of what the interpreter counts."""
    return Inputs(torch.device("cpu"), torch.bfloat16)


@dataclass(frozen=True)
class Problem:
    """One operation at one size: leaves by name, and `run(leaves, backend)`, which returns outputs by name.

    `run` is our operation, with backend triton, torch or reference (see the operation's op.py); it is compared with float64 in
    every output and every gradient, and timed and counted only by its first output. `forward`, `backward`: the least of each
    pass for 2-byte numbers. `peers`: the same computation by public packages, as they are called on a GPU; those that are not
    installed are left out. `labels`: what a loss is of.
    `sums`: leaves whose gradient sums over all tokens the gradient of another leaf, which is named: where the sum cancels, it
    keeps fewer digits in any implementation, so its error is compared with the size of what is summed.
    `exact`: the backend that is taken for exact in float64, "torch" where a token at a time would take too long.
    """

    leaves: Mapping[str, Tensor]
    run: Callable[[Mapping[str, Tensor], str], Mapping[str, Tensor]]
    shape: str = ""
    forward: Minimum = NOTHING
    backward: Minimum = NOTHING
    peers: Callable[[], dict[str, Compute]] = dict
    labels: Tensor | None = None
    sums: Mapping[str, str] = field(default_factory=dict)
    exact: str = "reference"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The leaves in order, as `on` and peers take them."""
        return tuple(self.leaves.values())

    def on(self, backend: str) -> Compute:
        """Our operation's first output with one backend, as a function of only the leaves."""
        return lambda *leaves: next(iter(self.run(dict(zip(self.leaves, leaves)), backend).values()))


@dataclass(frozen=True)
class Goal:
    """Counted bytes are to be at most `limit` times `bytes`; `text` says what that is.

    `argument`: of these the bytes that programs ask to read of this kernel argument, not all that moves.
    """

    text: str
    bytes: float
    limit: float
    argument: str | None = None


@dataclass(frozen=True)
class CountedProblem:
    """A problem small enough for the interpreter, under the name and the goals of the audit.

    `has_backward`: whether its backward pass is counted too. `library`: products that forward leaves to PyTorch, which
    no one counts.
    """

    op: str
    problem: Problem
    forward_goal: Goal | None = None
    backward_goal: Goal | None = None
    has_backward: bool = True
    library: Minimum = NOTHING


@dataclass(frozen=True)
class GpuSizes:
    """Sizes of problems on a GPU; the defaults are those of Granite-4-H-Small on one sequence of 8,192 tokens."""

    tokens: int = 8192
    model: int = 4096
    heads: int = 128
    head_dim: int = 64
    state: int = 128
    experts: int = 72
    top_k: int = 10
    expert_width: int = 768
    attention_heads: int = 32
    kv_heads: int = 8
    attention_dim: int = 128
    vocabulary: int = 100352


@dataclass(frozen=True)
class HostSizes:
    """Sizes of problems on a CPU: the benchmark's model, with the experts of Granite-4-H-Tiny."""

    rows: int = 4
    tokens: int = 512
    model: int = 256
    heads: int = 8
    head_dim: int = 64
    state: int = 128
    selective_state: int = 16
    experts: int = 64
    top_k: int = 6
    expert_width: int = 64
    norm_width: int = 1024
    vocabulary: int = 8192


def formula_goals(problem: Problem, limit: float) -> tuple[Goal, Goal]:
    """Of each pass: at most `limit` times the bytes of the formula."""
    return Goal("of the formula", problem.forward.bytes, limit), Goal("of the formula", problem.backward.bytes, limit)


def find_package(module: str) -> Any:
    """A module of a package that may not be installed: None where it is not."""
    top = module.partition(".")[0]
    return importlib.import_module(module) if importlib.util.find_spec(top) is not None else None


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


@dataclass(frozen=True)
class OperationCase:
    """An operation of `kernels/`: every way in which it is compiled, counted, checked and timed.

    `counted`: problems of the audit. `trials`: what its kernels are compared with float64 at. `on_gpu`, `on_host`:
    builders of the problems that are timed, by the name that the benchmarks give them. `also`: calls on the meta device of
    kernels that no trial reaches there, such as those that only tuning chooses; with the trials they are what is compiled
    ahead of time (`amfm.kernels.proof.recorded`). `first_architecture`: the oldest that has what all of it needs.
    """

    name: str
    counted: Callable[[], Iterator[CountedProblem]]
    trials: Callable[[], Iterator[Sized]]
    on_gpu: Mapping[str, Callable[[Inputs, GpuSizes], Problem]] = field(default_factory=dict)
    on_host: Mapping[str, Callable[[Inputs, HostSizes], Problem]] = field(default_factory=dict)
    also: Callable[[], None] = lambda: None
    first_architecture: int = 80

    def trials_of(self, kinds: Collection[Kind] = ()) -> list[Sized]:
        """The trials of these kinds, all if none is named."""
        return [each for each in self.trials() if not kinds or each.kind in kinds]
