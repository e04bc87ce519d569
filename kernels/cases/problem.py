"""Problems of an operation: inputs, a call, the least that must move, and sizes.

Five commands ask the same about an operation: what does its kernel take on a GPU (ahead-of-time table), how near does it
come to float64, what does it move (audit in the interpreter), how fast is it on this GPU and on this CPU. Each needs inputs,
a call, the least that must move, and its own sizes. So an operation has one builder of `Problem` from sizes, and every command brings its
sizes. Nothing here needs more than torch, triton and numpy: a bare machine with a GPU can run every case. Peers that
are public kernel packages belong to a problem and are looked for when asked; transformers, on the CPU, is launch's
business.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
