"""The Triton router and experts in the interpreter against the one-expert-at-a-time definition."""

import pytest
import torch

from kernels.moe import triton_experts, triton_router
from kernels.moe.op import expert_feed_forward, group_by_expert, grouped_feed_forward, route
from tests.helpers.interpreted_products import multiply_term_by_term
from tests.helpers.numbers import assert_all_near, assert_bitwise
from tests.helpers.registration import assert_registered
from tests.kernels.test_moe import run

FLOAT32 = 1e-5  # products over some fifty terms; a softmax's gradient cancels


@pytest.mark.parametrize("activation", ["swiglu", "squared_relu"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 1},
        {"tokens": 63, "top_k": 1},
        {"tokens": 10, "experts": 9, "top_k": 8},
        {"tokens": 7, "experts": 1, "top_k": 1},
        {"tokens": 40, "experts": 6, "empty": (0, 3, 5)},
        {"tokens": 17, "model": 50, "hidden": 37, "score": "sigmoid"},
    ],
)
def test_experts_equal_the_definition_twice_bitwise(sizes, activation, poisoned_memory):
    wanted_routing, wanted = run("reference", torch.float64, activation=activation, **sizes)
    routing, once = run("triton", torch.float32, activation=activation, **sizes)
    _, again = run("triton", torch.float32, activation=activation, **sizes)
    assert torch.equal(routing.expert_ids_RK, wanted_routing.expert_ids_RK)
    assert torch.equal(routing.counts_E, wanted_routing.counts_E)
    assert_all_near(once, wanted, FLOAT32, ["y", "dx", "d_up", "d_down", "d_logits"])
    for one, other in zip(once, again):
        assert_bitwise(one, other)


def run_router(backend, logits, bias, settings):
    leaf = logits.clone().requires_grad_()
    routing = route(leaf, bias, **settings, backend=backend)
    scores, weights = routing.scores_RE, routing.weights_RK
    loss = (scores * torch.linspace(-1, 1, scores.numel()).view(scores.shape)).sum()
    loss = loss + (weights * torch.linspace(1, -2, weights.numel()).view(weights.shape)).sum()
    return routing, [weights, scores, *torch.autograd.grad(loss, leaf)]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("shape", "score", "top_k", "groups", "bias"),
    [
        ((1, 5), "softmax", 2, (1, 1), False),
        ((63, 64), "softmax", 8, (1, 1), False),
        ((63, 12), "sigmoid", 3, (3, 2), True),
        ((20, 128), "sigmoid", 6, (8, 4), True),
        ((9, 6), "softmax", 2, (6, 3), True),
        ((7, 4), "sigmoid", 1, (1, 1), False),
    ],
)
def test_router_equals_the_definition_and_breaks_ties_to_the_lowest(
    shape, score, top_k, groups, bias, ties, poisoned_memory
):
    generator = torch.Generator().manual_seed(shape[0])
    logits = torch.randn(shape, generator=generator) * 3
    logits = logits.round() if ties else logits
    biases = torch.randn(shape[1], generator=generator) * 0.3 if bias else None
    settings = {"score": score, "top_k": top_k, "normalize": top_k > 1, "scaling": 2.5}
    settings |= {"num_groups": groups[0], "group_top_k": groups[1]}
    wanted_routing, wanted = run_router("reference", logits.double(), biases, settings)
    routing, got = run_router("triton", logits, biases, settings)
    assert torch.equal(routing.expert_ids_RK, wanted_routing.expert_ids_RK)
    assert torch.equal(routing.counts_E, wanted_routing.counts_E)
    assert_all_near(got, wanted, FLOAT32, ["weights", "scores", "d_logits"])
    for one, other in zip(got, run_router("triton", logits, biases, settings)[1]):
        assert_bitwise(one, other)


@pytest.mark.parametrize("activation", ["swiglu", "squared_relu"])
def test_changing_tokens_leaves_every_bit_of_the_others(activation):
    """Changed tokens move the others inside tiles, where some libraries round a row of a product by its place."""
    generator = torch.Generator().manual_seed(5)
    x, up, down = (torch.randn(*shape, generator=generator) for shape in ((30, 8), (5, 16, 8), (5, 8, 8)))
    up = up if activation == "swiglu" else up[:, :8]
    ids = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(30)])
    weights = torch.rand(30, 2, generator=generator)
    results = []
    for factor, shift in ((1, 0), (7, 1)):
        changed, others = x.clone(), ids.clone()
        changed[10:20] *= factor
        others[10:20] = (others[10:20] + shift) % 5
        leaves = [changed.requires_grad_(), weights.clone().requires_grad_()]
        with multiply_term_by_term():
            y = expert_feed_forward(leaves[0], others, leaves[1], up, down, activation=activation, backend="triton")
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for one, other in zip(*results):
        assert_bitwise(torch.cat([one[:10], one[20:]]), torch.cat([other[:10], other[20:]]))
        assert not torch.equal(one, other)


def test_sorted_rows_need_no_gather(poisoned_memory):
    torch.manual_seed(2)
    x, up, down = (torch.randn(*shape, requires_grad=True) for shape in ((21, 8), (4, 16, 8), (4, 8, 8)))
    counts = torch.tensor([5, 0, 15, 1])
    results = []
    for backend in ("reference", "triton"):
        y = grouped_feed_forward(x, counts, up, down, activation="swiglu", backend=backend)
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, up, down))])
    assert_all_near(results[1], results[0], FLOAT32)


def test_rows_of_nan_still_name_experts():
    routing = route(
        torch.full((2, 5), float("nan")), None, score="sigmoid", top_k=2, normalize=True, scaling=1.0, backend="triton"
    )
    assert int(routing.expert_ids_RK.max()) < 5 and int(routing.expert_ids_RK.min()) >= 0


def test_registration_is_complete():
    torch.manual_seed(3)
    logits, bias = torch.randn(6, 4, requires_grad=True), torch.randn(4)
    assert_registered(triton_router._forward, logits, bias, False, 2, True, 1.0, 2, 1)
    x, up, down = (torch.randn(*shape, requires_grad=True) for shape in ((6, 8), (4, 16, 8), (4, 8, 8)))
    weights = torch.rand(6, 2, requires_grad=True)
    groups = group_by_expert(torch.randint(0, 4, (6, 2)), 4)
    inverse = groups.order.argsort()
    sorting = groups.order, inverse, groups.offsets_E
    assert_registered(triton_experts._forward, x, weights, *sorting, up, down, True)
