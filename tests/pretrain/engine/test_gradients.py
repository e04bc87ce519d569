"""Summing in float32, finding faults, clipping."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from amfm.pretrain.engine.gradients import (
    Float32Accumulator,
    GradientFault,
    PartialGradient,
    clip_by_norm,
    find_fault,
    sum_partial_gradients,
)
from tests.helpers.spawn import run_ranks


def test_bf16_gradients_are_summed_in_float32_and_rounded_once() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(7, 5, bias=False).bfloat16()
    inputs = torch.randn(64, 3, 7).bfloat16()
    expected = torch.zeros(5, 7, dtype=torch.float64)
    accumulator = Float32Accumulator(layer)
    for x in inputs:
        (own,) = torch.autograd.grad(layer(x).float().sum(), layer.weight)
        expected += own.double()
        layer(x).float().sum().backward()
    accumulator.finish()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.bfloat16
    assert torch.equal(layer.weight.grad, expected.to(torch.float32).bfloat16())

    layer.weight.grad = None
    for x in inputs:
        layer(x).float().sum().backward()
    plain = layer.weight.grad
    assert not torch.equal(plain, expected.to(torch.float32).bfloat16()), "the plain sum would have done as well"


def test_accumulator_leaves_float32_parameters_alone_and_removes_its_hooks() -> None:
    layer = nn.Linear(3, 2)
    accumulator = Float32Accumulator(layer)
    for _ in range(2):
        layer(torch.ones(1, 3)).sum().backward()
    accumulator.finish()
    assert layer.weight.grad is not None and torch.equal(layer.weight.grad, torch.full((2, 3), 2.0))


def test_a_gradient_that_comes_later_is_added_when_it_comes() -> None:
    layer = nn.Linear(3, 2, bias=False).bfloat16()
    accumulator = Float32Accumulator(layer)
    accumulator.collect(layer.weight)  # of a split backward pass, which makes it later
    layer.weight.grad = torch.ones(2, 3).bfloat16()
    accumulator.collect(layer.weight)
    accumulator.finish()
    assert torch.equal(layer.weight.grad, torch.ones(2, 3).bfloat16())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_fault_names_the_first_parameter(bad: float) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    model(torch.ones(1, 3)).sum().backward()
    assert find_fault(model) is None
    for index in (1, 2):
        grad = model[index].weight.grad
        assert grad is not None
        grad.flatten()[0] = bad
    assert find_fault(model) == GradientFault("1.weight", 2)


def test_no_gradients_are_no_fault() -> None:
    assert find_fault(nn.Linear(2, 2)) is None


@pytest.mark.parametrize(("largest", "factor"), [(None, 1.0), (100.0, 1.0), (1.0, 1 / 5)])
def test_clipping_scales_all_gradients_by_the_joint_norm(largest: float | None, factor: float) -> None:
    first, second = torch.tensor([3.0, 0.0]), torch.tensor([-4.0])
    clip_by_norm([first, second], 5.0, largest)
    # The formula adds 1e-6 to the norm.
    torch.testing.assert_close(first, torch.tensor([3.0, 0.0]) * factor, rtol=1e-6, atol=0)
    torch.testing.assert_close(second, torch.tensor([-4.0]) * factor, rtol=1e-6, atol=0)


def test_nothing_is_scaled_when_the_norm_is_not_finite() -> None:
    gradient = torch.tensor([2.0])
    clip_by_norm([gradient], float("inf"), 1.0)
    assert gradient.item() == 2.0


def sum_tied_gradients() -> torch.Tensor:
    """Two ends of a pipeline on each of three data ranks; each end has its own part of the tied embedding's gradient."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    ends = [torch.distributed.new_group([first, first + 3]) for first in range(3)]
    data = [torch.distributed.new_group(list(range(first, first + 3))) for first in (0, 3)]
    groups: Any = SimpleNamespace(embd=ends[rank % 3], dp_cp=data[rank // 3])
    table = nn.Parameter(torch.zeros(5))
    table.grad = torch.full((5,), 10.0**rank)
    sum_partial_gradients([PartialGradient("embedding", table, "embd")], groups)
    torch.distributed.all_reduce(table.grad, group=groups.dp_cp)  # as DeepSpeed does
    return table.grad


def test_tied_embeddings_are_summed_over_both_ends_and_counted_once_by_three_data_ranks() -> None:
    assert [found.tolist() for found in run_ranks(sum_tied_gradients, num_ranks=6)] == [[111_111.0] * 5] * 6
