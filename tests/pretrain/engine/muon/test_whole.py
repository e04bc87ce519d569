"""Kinds of Muon and optimizers of packages step whole matrices as their papers say, under every layout as on one rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from amfm.model.config.section import Section
from amfm.model.matrices import MatrixStack, list_matrices
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.config.optimizers import MatrixOptimizerSpec, MuonConfig, PackageMatrices
from amfm.pretrain.engine.muon.optimizer import Muon
from amfm.pretrain.engine.parts import Part, Span
from tests.helpers.spawn import run_ranks
from tests.pretrain.engine.muon.test_layouts import (
    DECAY,
    QUICK,
    RATE,
    SLOW,
    STEPS,
    Case,
    build,
    drawn,
    run_case,
)
from tests.pretrain.engine.muon.test_newton_schulz import plain_loop

BETAS = (0.9, 0.95)
Steps = Callable[[Tensor, list[Tensor]], Tensor]


def normuon_steps(weight: Tensor, gradients: list[Tensor]) -> Tensor:
    """NorMuon (arXiv 2510.05491, algorithm 1) with Nesterov's momentum, as its authors' program has it, of one matrix."""
    momentum, squares = torch.zeros_like(weight), torch.zeros(len(weight), 1, dtype=weight.dtype)
    for gradient in gradients:
        momentum = 0.95 * momentum + gradient
        o = plain_loop(gradient + 0.95 * momentum)
        squares = BETAS[1] * squares + (1 - BETAS[1]) * (o * o).mean(dim=1, keepdim=True)
        o_hat = o / (squares.sqrt() + 1e-10)
        norm = o_hat.square().sum().sqrt()
        step = 0.2 * RATE * math.sqrt(weight.numel()) / norm if norm > 0 else 0.0
        weight = weight - RATE * DECAY * weight - step * o_hat
    return weight


def on_sphere(weight: Tensor, update: Tensor, radius: Tensor) -> Tensor:
    """Hyperball's update (arXiv 2606.16899): W <- R Normalize(W - rate R Normalize(u)), R the first norm of the weights."""
    size = update.square().sum().sqrt()
    moved = weight - RATE * radius * update / size if size > 0 else weight
    return radius * moved / moved.square().sum().sqrt()


def hyperball_steps(weight: Tensor, gradients: list[Tensor]) -> Tensor:
    """Muon's direction on the sphere."""
    radius, momentum = weight.square().sum().sqrt(), torch.zeros_like(weight)
    for gradient in gradients:
        momentum = 0.95 * momentum + gradient
        weight = on_sphere(weight, plain_loop(gradient + 0.95 * momentum), radius)
    return weight


def adam_hyperball_steps(weight: Tensor, gradients: list[Tensor]) -> Tensor:
    """Adam's direction (Kingma and Ba 2015, algorithm 1) on the sphere."""
    radius, first, second = weight.square().sum().sqrt(), torch.zeros_like(weight), torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, 1):
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient * gradient
        update = first / (1 - BETAS[0] ** step) / ((second / (1 - BETAS[1] ** step)).sqrt() + 1e-8)
        weight = on_sphere(weight, update, radius)
    return weight


class Options(Section):
    """Of the package's optimizer below; `faulty`: it returns another shape."""

    faulty: bool = False


def whitened(
    weight_NRC: Tensor,
    gradient_NRC: Tensor,
    state: dict[str, Tensor],
    step: int,
    group: dict[str, Any],
    options: Options,
) -> Tensor:
    """A package's update, which needs all of a matrix: by the inverse of a sum of Gram matrices of its columns."""
    if options.faulty:
        return weight_NRC.mT
    state["grams"].add_(gradient_NRC.mT @ gradient_NRC)
    one_CC = torch.eye(weight_NRC.shape[2], dtype=weight_NRC.dtype)
    return weight_NRC - group["lr"] * torch.linalg.solve(state["grams"] + step * one_CC, gradient_NRC, left=False)


def whitened_shapes(rows: int, columns: int, options: Options) -> dict[str, tuple[int, ...]]:
    """A state of another shape than the matrix."""
    return {"grams": (columns, columns)}


def whitened_steps(weight: Tensor, gradients: list[Tensor]) -> Tensor:
    """The same for one matrix."""
    grams = torch.zeros(weight.shape[1], weight.shape[1], dtype=weight.dtype)
    for step, gradient in enumerate(gradients, 1):
        grams = grams + gradient.T @ gradient
        weight = weight - RATE * gradient @ torch.linalg.inv(grams + step * torch.eye(len(grams), dtype=grams.dtype))
    return weight


def package(**options: Any) -> PackageMatrices:
    here = "tests.pretrain.engine.muon.test_whole"
    spec = MatrixOptimizerSpec("whitened", f"{here}:whitened", Options, shapes=f"{here}:whitened_shapes", per_head=True)
    return PackageMatrices(spec, Options(**options))


RULES: dict[str, tuple[MuonConfig | PackageMatrices, Steps]] = {
    "normuon": (MuonConfig(rule="normuon"), normuon_steps),
    "hyperball": (MuonConfig(rule="hyperball"), hyperball_steps),
    "adam_hyperball": (MuonConfig(rule="adam_hyperball"), adam_hyperball_steps),
    "package": (package(), whitened_steps),
}
# Plain Muon steps under all of these in test_layouts.py: ways of ZeRO, heads together, cuts of rows, columns and experts.
CASES: dict[str, list[Case]] = {
    "normuon": [QUICK[1], QUICK[2]],
    "hyperball": [QUICK[3]],
    "adam_hyperball": [QUICK[2]],
    "package": [QUICK[0], QUICK[1]],
}


def settings_for(rule: str, case: Case) -> MuonConfig | PackageMatrices:
    settings, _ = RULES[rule]
    return settings.model_copy(update={"per_head": case[2]}) if isinstance(settings, MuonConfig) else settings


def run_rules(cases: dict[str, list[Case]]) -> dict[str, list[dict[str, Tensor]]]:
    # A package decides itself whether heads are separate; its spec above has them so.
    return {
        rule: [run_case((*case[:2], case[2] or rule == "package"), settings_for(rule, case)) for case in members]
        for rule, members in cases.items()
    }


def expected_weights(steps: Steps, per_head: bool) -> dict[str, Tensor]:
    """Three steps on each whole matrix."""
    groups = single_rank_groups()
    model, weights = build(groups), {}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for stack in list_matrices(model, groups, per_head=per_head):
        values = [drawn(stack.name, step, shapes[stack.name]).view(-1) for step in range(STEPS + 1)]
        weight = weights.setdefault(stack.name, values[0].clone())
        for number in range(stack.count):
            start = stack.start + number * stack.rows * stack.columns
            own = slice(start, start + stack.rows * stack.columns)
            first, *gradients = (value[own].view(stack.rows, stack.columns) for value in values)
            weight[own] = steps(first, gradients).view(-1)
    return {name: weight.view(shapes[name]) for name, weight in weights.items()}


def assert_as_published(cases: dict[str, list[Case]], num_ranks: int) -> None:
    found = run_ranks(run_rules, cases, num_ranks=num_ranks)[0]
    for rule, members in cases.items():
        for case, weights in zip(members, found[rule], strict=True):
            expected = expected_weights(RULES[rule][1], case[2] or rule == "package")
            assert weights.keys() == expected.keys()
            for name, weight in weights.items():
                error = float((weight - expected[name]).abs().max())
                assert error < 1e-10, f"{rule}, {case}: {name} is off by {error}"


def test_published_rules_step_whole_matrices_on_one_rank() -> None:
    assert_as_published({rule: [({}, "flat", True)] for rule in RULES}, 1)


@pytest.mark.slow
def test_published_rules_step_cut_matrices_as_whole_ones() -> None:
    assert_as_published(CASES, 4)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_rule_under_every_cut(num_ranks: int) -> None:
    cases = QUICK + SLOW if num_ranks == 4 else [case for case in SLOW if not case[0]]
    assert_as_published(dict.fromkeys(RULES, cases), num_ranks)


def alone(weight: torch.nn.Parameter, settings: MuonConfig | PackageMatrices) -> Muon:
    """One matrix only on this process, with a gradient."""
    weight.grad = torch.ones_like(weight)
    muon = Muon([{"label": "matrices", "weight_decay": 0.0, "params": [weight]}], settings, lr=0.1)
    spans = (Span("blocks.0.up", 0, weight.numel(), 0),)
    part = Part(weight, 0, spans, (0,), True, None, lambda rank: spans)
    muon.attach([part], [MatrixStack("blocks.0.up", 0, 1, *weight.shape)], single_rank_groups(), "float32")
    return muon


@pytest.mark.parametrize(
    ("settings", "weight", "message"),
    [
        (
            package(faulty=True),
            torch.ones(3, 5),
            r"kind=whitened: its update returned \[1, 5, 3\] for 1 matrices of blocks.0.up",
        ),
        (MuonConfig(rule="hyperball"), torch.zeros(3, 5), r"rule=hyperball: blocks.0.up .* begins as zeros"),
    ],
)
def test_another_shape_and_a_norm_of_zero_are_refused_by_name(
    settings: MuonConfig | PackageMatrices, weight: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        alone(torch.nn.Parameter(weight), settings).step()


def test_states_are_named_by_matrix_whatever_rank_has_them() -> None:
    muon = alone(torch.nn.Parameter(torch.ones(3, 5)), MuonConfig(rule="normuon"))
    assert {name: list(state.shape) for name, state in muon.owned_states().items()} == {
        "optimizer/blocks.0.up/0/momentum": [3, 5],
        "optimizer/blocks.0.up/0/row_squares": [3],
    }


def test_shapes_that_are_no_dict_of_tuples_are_refused_by_name() -> None:
    wrong = PackageMatrices(
        MatrixOptimizerSpec(
            "wrong", "none:update", Options, shapes="tests.pretrain.engine.muon.test_whole:list_shapes"
        ),
        Options(),
    )
    with pytest.raises(TypeError, match=r"optimizer.kind=wrong: .* must return a dict of tuples"):
        wrong.state_shapes(3, 5)


def list_shapes(rows: int, columns: int, options: Options) -> list[int]:
    return [rows, columns]
