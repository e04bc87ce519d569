"""linear by a weight with a recipe, emulated: formulas in float64, bands of error, sums, split passes, recomputation."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from amfm.kernels.common.weight_gradients import Later, compute_now, split_backward
from amfm.kernels.linear.op import linear, linear_gradients
from amfm.kernels.low_precision.formats import draw_noise, quantize, turn
from amfm.kernels.low_precision.recipe import NAMES, Recipe, recipe_of, seed_of
from tests.helpers.gradient_place import Place

# float32 products of decoded operands against float64: sums of up to 300 products.
EXACT = 1e-6


def given(recipe: Recipe, rows=(2, 65), inputs=200, outputs=144, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, inputs, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(*rows, outputs, generator=generator).to(dtype)
    weight.recipe = recipe
    return x, weight, grad


def run(x, weight, grad, call=linear):
    x.grad = weight.grad = None
    y = call(x, weight)
    y.backward(grad)
    return y.detach(), x.grad, weight.grad


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def by_formulas(x, weight, grad, recipe):
    """The three products of decoded operands in float64, each operand quantised from the wide numbers along the sum."""
    x, weight, grad = (tensor.detach().flatten(0, -2).float() for tensor in (x, weight, grad))

    def values(tensor, **how):
        return quantize(tensor, recipe.name, **how).values().double()

    if recipe.name != "nvfp4":
        noises, turned = (None, None), lambda columns: columns
    else:
        filled = -(-len(grad) // 16) * 16
        noises = draw_noise(grad, recipe.seed, 1), draw_noise(grad, recipe.seed, 2, filled).t()
        turned = lambda columns: turn(columns, recipe.seed)  # noqa: E731
    y = values(x) @ values(weight, weight=True).t()
    dx = values(grad, noise=noises[0]) @ values(weight.t(), weight=True).t()
    if recipe.weight_gradient == "bf16":
        dw = grad.double().t() @ x.double()
    else:
        dw = values(turned(grad.t()), noise=noises[1]) @ values(turned(x.t())).t()
    return y, dx, dw


@pytest.mark.parametrize("rows", [(1, 1), (2, 65)])
@pytest.mark.parametrize("recipe", [*map(Recipe, NAMES), Recipe("nvfp4", weight_gradient="bf16", seed=9)])
def test_all_three_products_are_those_of_decoded_operands(recipe, rows):
    x, weight, grad = given(recipe, rows)
    for found, exact in zip(run(x, weight, grad), by_formulas(x, weight, grad, recipe), strict=True):
        assert error(found.flatten(0, -2), exact) <= EXACT
    results = run(*given(recipe, rows, dtype=torch.bfloat16))
    assert all(result.dtype == torch.bfloat16 for result in results)


@pytest.mark.parametrize(("name", "forward", "backward"), [
    ("fp8_block", 0.037, 0.038), ("mxfp8", 0.037, 0.038), ("nvfp4", 0.146, 0.17),
])  # fmt: skip
def test_errors_of_products_of_normal_numbers_lie_in_their_bands(name, forward, backward):
    x, weight, grad = given(Recipe(name), rows=(128,), inputs=256, outputs=192)
    exact = [tensor.detach().double() for tensor in (x, weight, grad)]
    products = exact[0] @ exact[1].t(), exact[2] @ exact[1], exact[2].t() @ exact[0]
    for found, product, band in zip(run(x, weight, grad), products, (forward, backward, backward), strict=True):
        assert 0.8 * band <= error(found, product) <= 1.2 * band


@pytest.mark.parametrize("name", NAMES)
def test_recomputation_gives_the_same_bits(name):
    x, weight, grad = given(Recipe(name, seed=5), dtype=torch.bfloat16)
    plain = run(x, weight, grad)
    again = run(x, weight, grad, lambda x, weight: checkpoint(linear, x, weight, use_reentrant=False))
    assert all(map(torch.equal, plain, again))


@pytest.mark.parametrize(
    "recipe", [Recipe("fp8_block"), Recipe("nvfp4", seed=5), Recipe("mxfp8", weight_gradient="bf16")]
)
def test_a_weight_gradient_lands_in_its_sum_now_and_in_a_split_pass(recipe):
    x, weight, grad = given(recipe)
    _, dx, dw = run(x, weight, grad)
    place = Place.of(weight)
    for passes in (1, 2):
        assert torch.equal(run(x, weight, grad)[1], dx)
        assert weight.grad is None and torch.equal(place.sum, dw * passes)
    later: Later = []
    with split_backward(later):
        run(x, weight, grad)
    assert place.passes == 2 and torch.equal(x.grad, dx)
    compute_now(later, lambda weight: None)
    assert place.passes == 3 and torch.allclose(place.sum, 3 * dw)
    del weight.gradient_sum
    with split_backward(later):
        run(x, weight, grad)
    compute_now(later, lambda weight: None)
    assert torch.equal(weight.grad, dw)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_apart_are_those_of_the_layer_and_a_frozen_weight_keeps_nothing_of_its_input(name):
    recipe = Recipe(name, seed=5)
    x, weight, grad = given(recipe)
    _, dx, dw = run(x, weight, grad)
    apart = linear_gradients(x.detach(), weight.detach(), grad, None, recipe)
    assert torch.equal(apart[0], dx) and torch.equal(apart[1], dw)
    saved = []

    def note(tensor):
        saved.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        linear(x, weight)
        kept = {shape: dtype for shape, dtype in saved}
        assert kept.pop((144, 200)) == torch.float32
        codes = [shape for shape, dtype in kept.items() if dtype == torch.uint8]
        assert codes == [(200, 144 if name == "nvfp4" else 130)] and (2, 65, 200) not in kept
        saved.clear()
        frozen = weight.detach()
        frozen.recipe = recipe
        linear(x, frozen)
        assert saved == [((144, 200), torch.float32)]


def test_a_recipe_is_found_on_the_weight_alone_and_seeds_differ_by_name():
    weight = torch.ones(3, 3)
    assert recipe_of(weight) is None and recipe_of(None) is None
    weight.recipe = Recipe("mxfp8")
    assert recipe_of(weight) == Recipe("mxfp8")
    seeds = {seed_of(seed, name) for seed in (1, 2) for name in ("a.weight", "b.weight")}
    assert len(seeds) == 4 and all(0 <= seed < 2**31 for seed in seeds) and seed_of(1, "a.weight") in seeds
    with pytest.raises(ValueError, match="fp8_block, mxfp8, nvfp4; got 'fp8'"):
        Recipe("fp8")
