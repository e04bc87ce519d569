"""Timed cases: an operation of `kernels.proof.cases` with a function for each variant, ours and the peers'."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.proof.cases.case import CardSizes, Compute, HostSizes, Minimum, Problem
from kernels.proof.cases.operations import card_problem, host_problem
from launch.bench.kernels.transformers_peers import add_transformers


@dataclass(frozen=True)
class TimedCase:
    """One operation in one dtype: leaves (tensors that get gradients), variants over them, least work of each pass."""

    op: str
    shape: str
    dtype: torch.dtype
    leaves: tuple[Tensor, ...]
    variants: dict[str, Compute]
    forward: Minimum
    backward: Minimum


def card_case(op: str, device: torch.device, sizes: CardSizes) -> TimedCase:
    """An operation of `ON_CARD` in bfloat16: our two backends, PyTorch's own and the public packages found here."""
    problem = card_problem(op, device, sizes)
    ours = {"triton": problem.on("triton"), "torch": problem.on("torch")}
    return _timed(op, torch.bfloat16, problem, ours | problem.peers())


def host_case(op: str, dtype: torch.dtype, sizes: HostSizes | None = None) -> TimedCase:
    """An operation of `ON_HOST`: ours on PyTorch, our definition a token at a time, and transformers' own modules."""
    sizes = sizes or HostSizes()
    problem = host_problem(op, dtype, sizes)
    return _timed(op, dtype, problem, add_transformers(op, problem, dtype, sizes))


def _timed(op: str, dtype: torch.dtype, problem: Problem, variants: dict[str, Compute]) -> TimedCase:
    return TimedCase(op, problem.shape, dtype, problem.leaves, variants, problem.forward, problem.backward)
