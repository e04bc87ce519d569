"""Rows of a rank's only expert against the definition and the grouped form, without rows too."""

from contextlib import nullcontext

import pytest
import torch

from amfm.kernels.common.weight_gradients import compute_now, split_backward
from amfm.kernels.low_precision.recipe import Recipe
from amfm.kernels.moe.op import expert_feed_forward, only_expert_feed_forward
from amfm.kernels.swiglu.gate import PLAIN
from tests.helpers.gradient_place import Place
from tests.helpers.numbers import assert_all_near, assert_bitwise

NAMES = ["y", "dx", "d_weights", "d_up", "d_down"]
# float64 sums of some fifty products in another order.
FLOAT64 = 1e-12


def only_leaves(rows, dtype=torch.float64, *, activation="swiglu", model=16, hidden=9, seed=5):
    """Rows, their weights, up and down."""
    generator = torch.Generator().manual_seed(seed)
    width = hidden * (1 if activation in PLAIN else 2)
    shapes = (rows, model), (rows,), (1, width, model), (1, model, hidden)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def run_only(leaves, *, activation="swiglu", backend="torch", grouped=False, later=None):
    """Output and gradients; `grouped`: as one of a group of experts that has one."""
    for leaf in leaves:
        leaf.grad = None
    x, weights, up, down = leaves
    with nullcontext() if later is None else split_backward(later):
        if grouped:
            ids = torch.zeros(len(x), 1, dtype=torch.int64)
            y = expert_feed_forward(x, ids, weights[:, None], up, down, activation=activation, backend=backend)
        else:
            y = only_expert_feed_forward(x, weights, up, down, activation=activation, backend=backend)
        y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def check_sums_and_split(backend, dtype):
    """Gradients that land in sums over two passes, and those that are computed later, are those of autograd, bitwise."""
    leaves = only_leaves(21, dtype)
    whole = [each.clone() for each in run_only(leaves, backend=backend)]
    later = []
    split = run_only(leaves, backend=backend, later=later)
    assert split[3] is None and split[4] is None and len(later) == 1
    compute_now(later, lambda weight: None)
    for found, wanted in zip([*split[:3], leaves[2].grad, leaves[3].grad], whole, strict=True):
        assert_bitwise(found, wanted)
    places = [Place.of(leaf) for leaf in leaves[2:]]
    for _ in range(2):
        assert run_only(leaves, backend=backend)[3:] == [None, None]
    for place, gradient in zip(places, whole[3:], strict=True):
        assert_bitwise(place.sum, (gradient.float() + gradient.float()).to(place.sum.dtype))


@pytest.mark.parametrize(
    ("rows", "activation"), [(63, "swiglu"), (1, "squared_relu"), (0, "swiglu"), (20, "swiglu_oai@1.5")]
)
def test_the_only_expert_is_the_definition_and_the_grouped_form(rows, activation, poisoned_memory):
    leaves = only_leaves(rows, activation=activation)
    wanted = [each.clone() for each in run_only(leaves, activation=activation, backend="reference")]
    found = [each.clone() for each in run_only(leaves, activation=activation)]
    assert_all_near(found, wanted, FLOAT64, NAMES)
    for one, other in zip(found, run_only(leaves, activation=activation, grouped=True), strict=True):
        assert_bitwise(one, other)


def test_gradients_land_and_split_to_the_bit(poisoned_memory):
    check_sums_and_split("torch", torch.float32)


def test_an_emulated_recipe_computes_what_the_grouped_form_does(poisoned_memory):
    leaves = only_leaves(40, torch.float32, model=40)
    for weight in leaves[2:]:
        weight.recipe = Recipe("fp8_block", emulate=True)
    found = [each.clone() for each in run_only(leaves)]
    for one, other in zip(found, run_only(leaves, grouped=True), strict=True):
        assert_bitwise(one, other)


def test_weights_of_two_experts_are_rejected():
    x, weights, up, down = only_leaves(3)
    with pytest.raises(ValueError, match="up_EFD"):
        only_expert_feed_forward(x, weights, up.expand(2, -1, -1), down.expand(2, -1, -1), activation="swiglu")
