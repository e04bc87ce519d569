"""Experts by weights with a recipe, emulated: formulas in float64, empty experts, sums, split passes, slots, recomputation."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from amfm.kernels.common.weight_gradients import Later, compute_now, split_backward
from amfm.kernels.low_precision.formats import draw_noise, quantize, turn
from amfm.kernels.low_precision.recipe import NAMES, Recipe
from amfm.kernels.moe.op import expert_feed_forward, grouped_feed_forward
from tests.helpers.gradient_place import Place

# float32 products against float64. An activation that float32 rounds the other way falls on another code: one in thousands.
NEAR = {"formula": 2e-3, "recomputed": 0.0}
EXPERTS, MODEL, WIDTH = 5, 72, 40


def leaves(name, activation="swiglu", tokens=301, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).requires_grad_()

    x, weights = normal(tokens, MODEL), torch.rand(tokens, 2, generator=generator).add(0.1).requires_grad_()
    features = 2 * WIDTH if activation == "swiglu" else WIDTH
    up, down = normal(EXPERTS, features, MODEL, scale=0.2), normal(EXPERTS, MODEL, WIDTH, scale=0.2)
    up.recipe, down.recipe = Recipe(name, seed=3, **options), Recipe(name, seed=4, **options)
    # No one chooses expert 2, and 200 tokens choose expert 0, more than a run of 128.
    ids = torch.tensor([0, 1, 3, 4])[torch.rand(tokens, 4, generator=generator).topk(2).indices]
    ids[:200, 0], ids[:200, 1] = 0, 3
    return x, ids, weights, up, down


def run(x, ids, weights, up, down, activation="swiglu", call=expert_feed_forward):
    for leaf in (x, weights, up, down):
        leaf.grad = None
    y = call(x, ids, weights, up, down, activation=activation)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).sin().to(y.dtype))
    return {"y": y.detach(), "x": x.grad, "weights": weights.grad, "up": up.grad, "down": down.grad}


def by_formulas(x, ids, weights, up, down, activation):
    """Every expert on its own, products of decoded operands in float64."""
    dy = torch.linspace(-1, 1, x.numel()).view_as(x).sin()
    recipe_up, recipe_down = up.recipe, down.recipe
    x, weights, up, down = (leaf.detach() for leaf in (x, weights, up, down))

    def along(rows, matrix, seed=None):
        noise = None if seed is None or recipe_up.name != "nvfp4" else draw_noise(rows, seed, 1)
        rows = quantize(rows.float(), recipe_up.name, noise=noise)
        return rows.values().double() @ quantize(matrix, recipe_up.name, weight=True).values().double().t()

    def outer(grads, rows, recipe):
        if recipe.weight_gradient == "bf16":
            return grads.double().t() @ rows.double()
        is_nvfp4 = recipe.name == "nvfp4"
        sides = [turn(side.float().t(), recipe.seed) if is_nvfp4 else side.float().t() for side in (grads, rows)]
        noise = draw_noise(grads, recipe.seed, 2, sides[0].shape[1]).t() if is_nvfp4 else None
        left = quantize(sides[0], recipe.name, noise=noise)
        return left.values().double() @ quantize(sides[1], recipe.name).values().double().t()

    found = {"y": torch.zeros_like(x).double(), "x": torch.zeros_like(x).double()}
    found |= {"weights": torch.zeros_like(weights).double()}
    found |= {"up": torch.zeros_like(up).double(), "down": torch.zeros_like(down).double()}
    for expert in range(EXPERTS):
        token, choice = (ids == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        weight = weights[token, choice, None].double()
        hidden = along(x[token], up[expert]).requires_grad_()
        if activation == "swiglu":
            active = torch.nn.functional.silu(hidden[:, :WIDTH]) * hidden[:, WIDTH:]
        else:
            active = hidden.relu().square()
        weighted = (active * weight).detach()
        found["y"].index_add_(0, token, along(weighted, down[expert]))
        v = along(dy[token], down[expert].t(), recipe_down.seed)
        found["weights"][token, choice] = (v * active).sum(1).detach()
        (d_hidden,) = torch.autograd.grad(active, hidden, v * weight)
        found["down"][expert] = outer(dy[token], weighted, recipe_down)
        found["up"][expert] = outer(d_hidden, x[token], recipe_up)
        found["x"].index_add_(0, token, along(d_hidden, up[expert].t(), recipe_up.seed))
    return found


@pytest.mark.parametrize("activation", ["swiglu", "squared_relu"])
@pytest.mark.parametrize(("name", "options"), [
    ("fp8_block", {}), ("fp8_block", {"weight_gradient": "bf16"}), ("mxfp8", {}),
])  # fmt: skip
def test_products_are_those_of_decoded_operands_of_each_expert(name, options, activation):
    given = leaves(name, activation, **options)
    exact = by_formulas(*given, activation)
    for key, found in run(*given, activation).items():
        assert (found - exact[key]).norm() <= NEAR["formula"] * exact[key].norm(), key
    assert not exact["up"][2].any() and not given[3].grad[2].any() and not given[4].grad[2].any()


def test_random_rounding_of_experts_is_near_the_wide_gradients():
    given = leaves("nvfp4")
    found = run(*given)
    del given[3].recipe, given[4].recipe
    for key, wide in run(*given).items():
        # Three quantised products in a row at most, 17% each.
        assert (found[key] - wide).norm() <= 0.35 * wide.norm(), key


@pytest.mark.parametrize("name", NAMES)
def test_recomputation_and_split_passes_give_the_same_bits_and_sums_take_them(name):
    given = leaves(name, dtype=torch.bfloat16)
    plain = run(*given)
    again = run(
        *given, call=lambda *leaves, **how: checkpoint(expert_feed_forward, *leaves, use_reentrant=False, **how)
    )
    assert all(torch.equal(plain[key], again[key]) for key in plain)
    later: Later = []
    with split_backward(later):
        split = run(*given)
    assert split.pop("up") is None and split.pop("down") is None
    assert all(torch.equal(plain[key], split[key]) for key in split)
    compute_now(later, lambda weight: None)
    assert torch.equal(given[3].grad, plain["up"]) and torch.equal(given[4].grad, plain["down"])
    places = Place.of(given[3]), Place.of(given[4])
    run(*given)
    once = [place.sum.clone() for place in places]
    run(*given)
    for place, first, key in zip(places, once, ("up", "down"), strict=True):
        assert torch.equal(first.bfloat16(), plain[key]) and torch.equal(place.sum, 2 * first)


@pytest.mark.parametrize("empty", [0, 9], ids=["full", "with empty slots"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_in_another_order_change_no_bit_and_rows_of_zeros_behind_them_nothing(name, empty):
    x, ids, _, up, down = leaves(name)
    order = ids.flatten().argsort(stable=True)
    counts = torch.bincount(ids.flatten(), minlength=EXPERTS)
    rows = x.detach()[order // 2]
    plain = grouped_feed_forward(rows, counts, up, down, activation="swiglu")
    plain.sum().backward()
    wanted = plain.detach(), up.grad.clone(), down.grad.clone()
    arrived = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    moved = torch.zeros(len(rows) + empty, MODEL)
    moved[arrived] = rows
    sources = torch.cat([arrived, torch.arange(len(rows), len(moved))])
    padded = counts.clone()
    padded[-1] += empty  # empty slots are rows of zeros behind the last expert's
    up.grad = down.grad = None
    y = grouped_feed_forward(moved, padded, up, down, activation="swiglu", sources_R=sources)
    y[arrived].sum().backward()
    assert not y[len(rows) :].any()
    for got, expected in zip((y[arrived], up.grad, down.grad), wanted, strict=True):
        # A product of more rows may add in another order, and a code that then rounds the other way changes a few numbers.
        assert torch.equal(got, expected) or (empty and (got - expected).norm() < 1e-3 * expected.norm())


def test_hidden_rows_are_saved_as_codes_and_change_gradients_by_their_rounding():
    wide, narrow = leaves("fp8_block", dtype=torch.bfloat16), leaves("fp8_block", dtype=torch.bfloat16, saved="fp8")
    sizes = []

    def note(tensor):
        if tensor.shape[-1] == 2 * WIDTH and tensor.dim() == 2:
            sizes.append(tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        results = run(*wide), run(*narrow)
    assert sizes == [2, 1] and torch.equal(results[0]["y"], results[1]["y"])
    for key in ("x", "weights", "up", "down"):
        off = (results[1][key].float() - results[0][key].float()).norm() / results[0][key].float().norm()
        assert 1e-3 < off < 0.06, key


def test_up_and_down_must_have_the_same_recipe():
    x, ids, weights, up, down = leaves("mxfp8")
    down.recipe = Recipe("mxfp8", emulate=True)
    with pytest.raises(ValueError, match="must have the same recipe"):
        expert_feed_forward(x, ids, weights, up, down, activation="swiglu")
