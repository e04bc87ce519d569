"""Problems that are timed compute what their reference does."""

import pytest
import torch

from amfm.kernels.cases import GpuSizes, Inputs
from benchmarks.kernels.operations import ON_CARD

SMALL = GpuSizes(
    tokens=63, model=32, heads=2, head_dim=16, state=16, experts=4, top_k=2, expert_width=16,
    attention_heads=2, kv_heads=1, attention_dim=16, vocabulary=64,
)  # fmt: skip


@pytest.mark.parametrize("name", [name for name in ON_CARD if name not in ("attention", "swiglu")])
def test_a_problem_in_float64_agrees_with_its_reference(name: str) -> None:
    problem = ON_CARD[name](Inputs(torch.device("cpu"), torch.float64), SMALL)
    results = []
    for backend in ("torch", "reference"):
        output = problem.on(backend)(*problem.tensors)
        results.append([output, *torch.autograd.grad(output, problem.tensors, torch.ones_like(output))])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
