"""Chooses the tiles of one operation's kernels on this GPU, each candidate verified before it is timed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from amfm.kernels.cases.problem import GpuSizes, Inputs, Problem
from amfm.kernels.proof.check import measure_milliseconds
from amfm.kernels.runtime.tuning import Table, find_environment, tune

# Relative RMS of any output or gradient in bfloat16 against float32 that a tuned kernel may have.
LARGEST_ERROR = 5e-2


def choose_tiles(
    build: Callable[[Inputs, GpuSizes], Problem],
    device: torch.device,
    sizes: GpuSizes,
    report: Callable[[str], None],
) -> Table:
    """Tune the kernels that a problem launches, forward and backward together, and save this GPU's table; returns it.

    Raises RuntimeError if this compiler miscompiles a kernel as it stands.
    """
    torch.manual_seed(0)
    problem = build(Inputs(device, torch.bfloat16), sizes)
    wide = tuple(leaf.detach().float().requires_grad_() for leaf in problem.tensors)
    exact = _results(problem, "torch", wide)
    table = Table.load(find_environment(device))
    tune(
        lambda: _results(problem, "triton", problem.tensors), exact, measure_milliseconds, table,
        tolerance=LARGEST_ERROR, report=report,
    )  # fmt: skip
    table.save()
    return table


def _results(problem: Problem, backend: str, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """Output and gradients, with ones as the incoming gradient."""
    output = problem.on(backend)(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output))]
