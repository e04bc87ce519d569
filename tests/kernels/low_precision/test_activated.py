"""The second half of a feed-forward that keeps hidden rows as codes: forward bitwise, gradients of decoded rows, memory."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from amfm.kernels.common.weight_gradients import Later, compute_now, split_backward
from amfm.kernels.linear.activated import activated_linear, keeps_codes
from amfm.kernels.linear.op import linear
from amfm.kernels.low_precision.formats import quantize
from amfm.kernels.low_precision.recipe import NAMES, Recipe
from amfm.kernels.swiglu.gate import GATES
from amfm.kernels.swiglu.op import squared_relu, swiglu
from tests.helpers.gradient_place import Place

UNITS = {"swiglu": swiglu, "limited": partial(swiglu, unit=GATES["swiglu_oai"]._replace(limit=1.5)), "squared_relu": squared_relu}  # fmt: skip


def given(recipe, rows=(2, 65), width=144, outputs=96, unit="swiglu", dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*rows, width * (1 if unit == "squared_relu" else 2), generator=generator).to(dtype)
    weight = torch.randn(outputs, width, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(*rows, outputs, generator=generator).to(dtype)
    weight.recipe = recipe
    return hidden.requires_grad_(), weight, grad


def run(call, hidden, weight, grad):
    hidden.grad = weight.grad = None
    y = call(hidden, weight)
    y.backward(grad)
    return y.detach(), hidden.grad, weight.grad


def kept(unit):
    return lambda hidden, weight: activated_linear(hidden, weight, UNITS[unit], backend="torch")


def apart(unit):
    return lambda hidden, weight: linear(UNITS[unit](hidden), weight)


@pytest.mark.parametrize(("unit", "recipe", "rows"), [
    *[("swiglu", Recipe(name, saved="fp8", seed=5), (2, 65)) for name in NAMES],
    ("limited", Recipe("fp8_block", saved="fp8"), (1, 1)),
    ("squared_relu", Recipe("fp8_block", saved="fp8", weight_gradient="bf16"), (3, 63)),
])  # fmt: skip
def test_forward_is_that_of_wide_rows_and_gradients_are_those_of_decoded_ones(unit, recipe, rows):
    hidden, weight, grad = given(recipe, rows, unit=unit)
    y, d_hidden, d_weight = run(kept(unit), hidden, weight, grad)
    assert torch.equal(y, run(apart(unit), hidden, weight, grad)[0])
    decoded = quantize(hidden.detach().flatten(0, -2), "fp8_block").values().to(hidden.dtype).view(hidden.shape)
    assert 0 < (decoded - hidden).norm() / hidden.norm() < 0.03
    _, wanted, wanted_weight = run(apart(unit), decoded.requires_grad_(), weight, grad)
    assert torch.equal(d_hidden, wanted) and torch.equal(d_weight, wanted_weight)


def test_recomputed_split_and_landed_it_gives_the_same_bits():
    hidden, weight, grad = given(Recipe("nvfp4", saved="fp8", seed=5), dtype=torch.float32)
    once = run(kept("swiglu"), hidden, weight, grad)
    again = run(lambda *x: checkpoint(kept("swiglu"), *x, use_reentrant=False), hidden, weight, grad)
    assert all(map(torch.equal, once, again))
    later: Later = []
    with split_backward(later):
        assert run(kept("swiglu"), hidden, weight, grad)[2] is None
    compute_now(later, lambda weight: None)
    assert torch.equal(weight.grad, once[2])
    place = Place.of(weight)
    assert torch.equal(run(kept("swiglu"), hidden, weight, grad)[1], once[1])
    assert weight.grad is None and torch.equal(place.sum, once[2])


def test_codes_of_hidden_rows_alone_are_kept_and_a_frozen_weight_gets_no_gradient():
    hidden, weight, grad = given(Recipe("fp8_block", saved="fp8"))
    saved = []

    def note(tensor):
        saved.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept("swiglu")(hidden, weight)
    assert saved == [((96, 144), torch.bfloat16), ((130, 288 + 16), torch.uint8)]
    d_hidden = run(kept("swiglu"), hidden, weight, grad)[1]
    frozen = weight.detach()
    frozen.recipe = weight.recipe
    _, same, none = run(kept("swiglu"), hidden, frozen, grad)
    assert torch.equal(same, d_hidden) and none is None


def test_rows_are_kept_as_codes_where_the_recipe_says_so_and_a_gradient_is_wanted():
    weight = torch.ones(3, 3)
    assert not keeps_codes(weight)
    for saved in ("bf16", "fp8"):
        weight.recipe = Recipe("mxfp8", saved=saved)
        assert keeps_codes(weight) == (saved == "fp8")
    with torch.no_grad():
        assert not keeps_codes(weight)
