"""Delta mixers as one Triton operation, in the interpreter, against their definition one token at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from amfm.kernels.cases import Inputs, Problem, evaluate
from amfm.kernels.delta_block import triton_impl
from amfm.kernels.delta_block.case import block_problem, deltanet, gated_deltanet, kda
from amfm.kernels.delta_block.op import delta_mix
from amfm.kernels.linear.op import linear
from amfm.kernels.low_precision.recipe import Recipe
from benchmarks.kernels.counting import count_launches
from tests.helpers.gradient_place import Place
from tests.helpers.numbers import assert_bitwise, assert_near
from tests.helpers.registration import assert_registered
from tests.kernels.twice import Twice

FLOAT32 = 1e-5
# One number per head or channel, a sum over all tokens.
SUMS = ("d_A_log", "d_dt_bias")


def problem(tokens: int, sizes: object, **settings: object) -> Problem:
    """A small problem in float32, the same at each call."""
    torch.manual_seed(0)
    inputs = Inputs(torch.device("cpu"), torch.float32)
    return block_problem(inputs, tokens, sizes, **{"model": 7, "chunk": 16, **settings})  # type: ignore[arg-type]


CASES: dict[str, Callable[[], Problem]] = {
    "gated_deltanet_two_heads_share_a_key": lambda: problem(17, gated_deltanet(1, 2, 12, 20), lengths=(5, 1, 11)),
    "deltaproduct_of_two_rows": lambda: problem(
        3, gated_deltanet(1, 1, 8, 12, steps=2, factor=2.0), rows=2, width=3, lengths=(2, 1)
    ),
    "deltanet": lambda: problem(17, deltanet(1, 16, 8), width=2),
    "kda_gates_apart": lambda: problem(18, kda(1, 12, 8), apart=True, lengths=(17, 1)),
    "kda_with_a_floor": lambda: problem(3, kda(2, 8, 8, floor=-5.0)),
    "one_token": lambda: problem(1, gated_deltanet(1, 1, 8, 8)),
}


def assert_all_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Within float32 of float64; of sums that cancel, compared with the size of what is summed (docs/kernels.md)."""
    for name, value in found.items():
        if name in SUMS:
            scale = expected[name].norm() + expected["d_decay"].norm()
            assert (value - expected[name]).norm() <= FLOAT32 * scale, name
        else:
            assert_near(value, expected[name], FLOAT32, name)


QUICK = ("gated_deltanet_two_heads_share_a_key", "kda_gates_apart", "one_token")


@pytest.mark.parametrize(
    "make",
    [pytest.param(make, id=name, marks=[] if name in QUICK else [pytest.mark.slow]) for name, make in CASES.items()],
)
def test_operation_equals_the_definition_twice_bitwise(
    make: Callable[[], Problem], twice: Twice, poisoned_memory: None
) -> None:
    case = make()
    assert_all_near(twice(lambda: evaluate(case, "triton").values), evaluate(case, "reference", torch.float64).values)


# Borders are after each L tokens: documents end at them, and one token before or behind; or one goes over several.
SEGMENTS: dict[str, Callable[[], Problem]] = {
    "gated_deltanet": lambda: problem(15, gated_deltanet(1, 2, 8, 12), lengths=(5, 4, 2, 4), segments=3),
    "kda_a_document_of_all": lambda: problem(12, kda(1, 8, 8), lengths=(11, 1), segments=3, apart=True),
    "deltaproduct": lambda: problem(6, gated_deltanet(1, 1, 8, 8, steps=2), lengths=(5, 1), segments=2),
}


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=[] if name == "deltaproduct" else [pytest.mark.slow])
        for name, make in SEGMENTS.items()
    ],
)
def test_segments_that_pass_windows_and_states_on_equal_the_whole_row(
    make: Callable[[], Problem], poisoned_memory: None
) -> None:
    case = make()
    assert_all_near(evaluate(case, "triton").values, evaluate(case, "reference", torch.float64).values)


@pytest.mark.parametrize("segments", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_gradient_of_the_outputs_weight_lands_in_its_sum_to_the_bit(segments: int, poisoned_memory: None) -> None:
    case = problem(8, gated_deltanet(1, 1, 8, 8), lengths=(8,), segments=segments)

    def run() -> Tensor | None:
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in case.leaves.items()}
        if place is not None:
            leaves["out_weight"].gradient_sum = place  # type: ignore[attr-defined]
        case.run(leaves, "triton")["out"].sum().backward()
        return leaves["out_weight"].grad

    place: Place | None = None
    wanted = run()
    assert wanted is not None
    place = Place.of(case.leaves["out_weight"].detach().requires_grad_())
    for _ in range(2):
        assert run() is None
    assert_bitwise(place.sum, 2 * wanted)


def test_an_output_weight_with_a_recipe_multiplies_the_closed_rows_by_it() -> None:
    case = problem(5, gated_deltanet(1, 2, 8, 8))
    leaves = {name: leaf.detach() for name, leaf in case.leaves.items()}
    weight = leaves["out_weight"].clone()
    closed = case.run(leaves | {"out_weight": torch.eye(16)}, "triton")["out"]
    weight.recipe = Recipe("fp8_block")  # type: ignore[attr-defined]
    assert_bitwise(case.run(leaves | {"out_weight": weight}, "triton")["out"], linear(closed, weight))


def test_what_is_kept_is_the_projection_and_o() -> None:
    sizes = gated_deltanet(1, 2, 8, 12)
    case = problem(11, sizes, whole=True)
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in case.leaves.items()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        case.run(leaves, "triton")
    weights = {leaf.data_ptr() for name, leaf in leaves.items() if name != "projected"}
    numbers = [x.numel() for x in kept if x.data_ptr() not in weights]
    assert sum(numbers) == 11 * (sum(sizes.widths(decay=True, gate=True).values()) + sizes.inner)


def test_launches_of_a_block_are_counted() -> None:
    case = problem(5, gated_deltanet(1, 2, 8, 12), whole=True)
    with count_launches() as launches:
        out = case.run(case.leaves, "triton")["out"]
        forward = len(launches)
        out.sum().backward()
    # Forward: q, k, v, beta, g; prepare and walk; close. Backward: close; five opened; four of the scan; five taken back; and
    # sums of parts: of the norm's weight, of three parts of the taps, of A_log with the bias.
    assert (forward, len(launches) - forward) == (8, 1 + 5 + 4 + 5 + 5)


def test_the_operation_says_the_truth_of_itself() -> None:
    case = problem(5, gated_deltanet(1, 2, 8, 12), whole=True)
    sizes = gated_deltanet(1, 2, 8, 12)
    names = ("projected", "conv_weight", "A_log", "dt_bias", "norm_weight", "out_weight")
    projected, *weights = (case.leaves[name].detach().requires_grad_() for name in names)
    numbers = sizes.numbers, sizes.floats, 16
    assert_registered(triton_impl._forward, projected, None, None, *weights, None, *numbers)
    o = torch.randn(1, 5, 2, 12)
    given = (x.detach() for x in (projected, *weights))
    first, *others = given
    assert_registered(
        triton_impl._backward, torch.randn(1, 5, 7), first, None, None, *others, None, o, *numbers, None, False
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A_log_H": None}, "A_log_H belongs to a decay"),
        ({"norm_weight_V": torch.ones(3)}, "norm_weight_V"),
        ({"conv_weight_CW": torch.ones(40, 5)}, "width of 2, 3 or 4"),
        ({"chunk_size": 24}, "chunk_size of 16, 32 or a multiple of 64"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], message: str) -> None:
    sizes = gated_deltanet(1, 2, 8, 12)
    arguments: dict[str, object] = {
        "projected_BTX": torch.ones(1, 3, sum(sizes.widths(decay=True, gate=True).values())),
        "conv_weight_CW": torch.ones(40, 4), "A_log_H": torch.ones(2), "dt_bias_X": torch.ones(2),
        "norm_weight_V": torch.ones(12), "out_weight_DI": torch.ones(7, 24), "sizes": sizes, "backend": "triton",
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        delta_mix(**(arguments | change))  # type: ignore[arg-type]
