"""Cases timed on a CPU: an operation with a function for each variant, ours and transformers'."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amfm.kernels.cases import Compute, HostSizes, Inputs, Minimum
from benchmarks.kernels.operations import ON_HOST
from benchmarks.kernels.transformers_peers import add_transformers


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


def host_case(op: str, dtype: torch.dtype, sizes: HostSizes | None = None) -> TimedCase:
    """An operation of `ON_HOST`: ours on PyTorch, our definition a token at a time, and transformers' own modules."""
    sizes = sizes or HostSizes()
    torch.manual_seed(0)  # the same numbers in every process
    problem = ON_HOST[op](Inputs(torch.device("cpu"), dtype), sizes)
    variants = add_transformers(op, problem, dtype, sizes)
    return TimedCase(op, problem.shape, dtype, problem.tensors, variants, problem.forward, problem.backward)
