"""Newton-Schulz against a plain loop, and a step of Muon against torch's on one device."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from amfm.model.matrices import MatrixStack
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.config.optimizers import MuonConfig
from amfm.pretrain.engine.muon.newton_schulz import COEFFICIENTS, cost, orthogonalize
from amfm.pretrain.engine.muon.optimizer import Muon
from amfm.pretrain.engine.parts import Part, Span


def plain_loop(matrix: Tensor, rounds: int = 5) -> Tensor:
    """One matrix at a time, in float64."""
    a, b, c = COEFFICIENTS
    x = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    x = x / (x.square().sum().sqrt() + 1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


@pytest.mark.parametrize("shape", [(1, 7), (5, 5), (3, 17), (17, 3)])
def test_a_stack_is_orthogonalised_matrix_by_matrix(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = orthogonalize(matrices, 5, shape=shape)
    for own, matrix in zip(found, matrices):
        torch.testing.assert_close(own, plain_loop(matrix), rtol=0, atol=1e-10)


def test_singular_values_come_near_one_and_zeros_stay() -> None:
    matrices = torch.randn(2, 64, 256, generator=torch.Generator().manual_seed(0))
    matrices[1] = 0.0
    found = orthogonalize(matrices, 5, shape=(64, 256))
    values = torch.linalg.svdvals(found[0])
    assert float(values.min()) > 0.6 and float(values.max()) < 1.2
    assert torch.equal(found[1], torch.zeros(64, 256))


def test_work_grows_with_the_square_of_the_short_side() -> None:
    assert cost((8, 4)) == cost((4, 8)) == 4 * 16 * 8 + 2 * 64


def alone(parameters: dict[str, torch.nn.Parameter], precision: str = "float32", **settings: object) -> Muon:
    """Muon over whole matrices only on this process."""
    groups = [{"label": "muon", "weight_decay": 0.1, "params": list(parameters.values())}]
    muon = Muon(groups, MuonConfig(**settings), lr=0.0, fused=True)
    parts, stacks = [], []
    for name, parameter in parameters.items():
        spans = (Span(name, 0, parameter.numel(), 0),)
        parts.append(Part(parameter, 0, spans, (0,), True, None, lambda rank, spans=spans: spans))
        stacks.append(MatrixStack(name, 0, 1, *parameter.shape))
    muon.attach(parts, stacks, single_rank_groups(), precision)
    return muon


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bf16", torch.bfloat16)])
def test_three_steps_are_those_of_torch(precision: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    first = {f"blocks.{shape}": torch.randn(shape, generator=generator) for shape in ((24, 64), (64, 24), (32, 32))}
    own = {name: torch.nn.Parameter(value.clone()) for name, value in first.items()}
    theirs = [torch.nn.Parameter(value.clone()) for value in first.values()]
    muon = alone(own, precision)
    assert {step.dtype for step in muon.steps} == {dtype}
    peer = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for mine, other in zip(own.values(), theirs):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        muon.param_groups[0]["lr"] = 1e-2
        muon.step()
        peer.step()
    for (name, mine), other in zip(own.items(), theirs):
        moved = other.detach() - first[name]
        # torch's iterates in bf16.
        assert float((mine.detach() - other.detach()).norm() / moved.norm()) < 2e-2
        assert float((moved / 3e-2).square().mean().sqrt()) == pytest.approx(0.2 / math.sqrt(3), rel=0.6)


def test_a_step_is_the_formula() -> None:
    weight = torch.nn.Parameter(torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    muon = alone({"blocks.0": weight}, momentum=0.9, rounds=3, update_rms=0.3)
    expected, momentum = weight.detach().clone(), torch.zeros(6, 10, dtype=torch.float64)
    for seed in range(3):
        gradient = torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        weight.grad = gradient.clone()
        muon.param_groups[0]["lr"] = 0.01
        muon.step()
        momentum = 0.9 * momentum + gradient
        step = 0.3 * math.sqrt(10) * plain_loop(gradient + 0.9 * momentum, 3)
        expected = (1 - 0.01 * 0.1) * expected - 0.01 * step
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-10)
    assert int(muon.state[weight]["step"]) == 3
