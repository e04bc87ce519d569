"""Expert feed-forward against the one-expert-at-a-time reference."""

from contextlib import nullcontext

import pytest
import torch

from amfm.kernels.common.weight_gradients import compute_now, split_backward
from amfm.kernels.moe import torch_impl
from amfm.kernels.moe.grouping import sort_stably
from amfm.kernels.moe.op import expert_feed_forward, group_by_expert, grouped_feed_forward, route
from amfm.kernels.moe.rows.op import choose_ranks
from amfm.kernels.moe.torch_grouped import begins_aligned
from amfm.kernels.swiglu.gate import PLAIN
from tests.helpers.gradient_place import Place
from tests.helpers.numbers import assert_bitwise, relative_rms
from tests.helpers.registration import assert_registered

# float64 sums of a few hundred products, in another order: a few hundred units in the last place.
FLOAT64_TOLERANCE = 1e-12
FLOAT32_TOLERANCE = 2e-6


def run(
    backend, dtype, *, tokens=63, model=16, hidden=8, experts=5, top_k=2, activation="swiglu", empty=(), score="softmax"
):
    generator = torch.Generator().manual_seed(tokens * 100 + experts)
    width = hidden * (1 if activation in PLAIN else 2)

    def make(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    x, up, down, logits = (
        make(tokens, model),
        make(experts, width, model),
        make(experts, model, hidden),
        make(tokens, experts),
    )
    with torch.no_grad():
        for expert in empty:
            logits[:, expert] = -20
    # One choice, normalized, has weight 1: its gradient is rounding noise around zero, which no tolerance can judge.
    routing = route(logits, None, score=score, top_k=top_k, normalize=top_k > 1, scaling=1.5, backend=backend)
    y = expert_feed_forward(
        x, routing.expert_ids_RK, routing.weights_RK, up, down, activation=activation, backend=backend
    )
    probe = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype)
    scores_probe = torch.randn(routing.scores_RE.shape, generator=generator, dtype=torch.float64)
    loss = (y * probe).sum() + (routing.scores_RE * scores_probe).sum()
    return routing, [y, *torch.autograd.grad(loss, (x, up, down, logits))]


@pytest.mark.parametrize("activation", ["swiglu", "swiglu_oai@1.5", "squared_relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 1},
        {"tokens": 63},
        {"tokens": 63, "top_k": 1},
        {"tokens": 20, "experts": 9, "top_k": 8},
        {"tokens": 7, "experts": 1, "top_k": 1},
        {"tokens": 40, "experts": 6, "empty": (0, 3, 5)},
        {"tokens": 33, "model": 10, "hidden": 6, "score": "sigmoid"},
        {"tokens": 33, "model": 10, "hidden": 6, "score": "sqrt_softplus"},
    ],
)
def test_torch_path_equals_the_reference_in_outputs_and_gradients(sizes, activation, poisoned_memory):
    for dtype, tolerance in ((torch.float64, FLOAT64_TOLERANCE), (torch.float32, FLOAT32_TOLERANCE)):
        wanted_routing, wanted = run("reference", torch.float64, activation=activation, **sizes)
        routing, got = run("torch", dtype, activation=activation, **sizes)
        assert torch.equal(routing.expert_ids_RK, wanted_routing.expert_ids_RK)
        assert torch.equal(routing.counts_E, wanted_routing.counts_E)
        for name, one, other in zip(("y", "dx", "d_up", "d_down", "d_logits"), got, wanted):
            scale = other.abs().max().clamp(min=1.0)
            assert (one - other).abs().max() <= 100 * tolerance * scale, name
            assert other.abs().max() < 1e-9 or relative_rms(one, other) <= tolerance, name


def split_gradients(backend, dtype, *, experts=5, empty=(), as_rows=False):
    """Gradients of x, up and down as autograd gives them, and with the weights' half computed later."""
    generator = torch.Generator().manual_seed(3)

    def make(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    x, up, down = make(21, 16), make(experts, 16, 16), make(experts, 16, 8)
    logits = make(21, experts)
    logits[:, list(empty)] = -20
    routing = route(logits, None, score="softmax", top_k=2, normalize=True, scaling=1.0, backend=backend)
    found = []
    for is_split in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, up, down)]
        later = []
        with split_backward(later) if is_split else nullcontext():
            if as_rows:
                counts = torch.tensor([21 - 4 * (experts - 1)] + [4] * (experts - 1))
                y = grouped_feed_forward(leaves[0], counts, *leaves[1:], activation="swiglu", backend=backend)
            else:
                choices = routing.expert_ids_RK, routing.weights_RK
                y = expert_feed_forward(leaves[0], *choices, *leaves[1:], activation="swiglu", backend=backend)
            y.backward(torch.ones_like(y))
        if is_split:
            assert leaves[0].grad is not None and leaves[1].grad is None and leaves[2].grad is None
            assert len(later) == 1
            compute_now(later, lambda weight: None)
        found.append([leaf.grad for leaf in leaves])
    return found


def landed_gradients(backend, *, is_split, experts=5, empty=(), width=8):
    """Of two passes the sums in which gradients of up and down landed, and what autograd gives of each pass."""
    generator = torch.Generator().manual_seed(4)
    up, down = (torch.randn(shape, generator=generator) for shape in ((experts, 2 * width, 16), (experts, 16, width)))
    leaves = [up.requires_grad_(), down.requires_grad_()]
    passes = []
    for tokens in (21, 30):
        x, logits = torch.randn(tokens, 16, generator=generator), torch.randn(tokens, experts, generator=generator)
        logits[:, list(empty)] = -20
        routing = route(logits, None, score="softmax", top_k=2, normalize=True, scaling=1.0, backend=backend)
        passes.append((x, routing.expert_ids_RK, routing.weights_RK))

    def differentiate(x, ids, weights):
        x = x.clone().requires_grad_()
        y = expert_feed_forward(x, ids, weights, *leaves, activation="swiglu", backend=backend)
        y.backward(torch.ones_like(y))
        return x.grad

    wanted = []
    for given in passes:
        d_x = differentiate(*given)
        wanted.append((d_x, *(leaf.grad for leaf in leaves)))
        leaves[0].grad = leaves[1].grad = None
    places = [Place.of(leaf) for leaf in leaves]
    collected = []
    for given, (d_x, *_) in zip(passes, wanted, strict=True):
        later = []
        with split_backward(later) if is_split else nullcontext():
            assert torch.equal(differentiate(*given), d_x)
        assert len(later) == is_split
        compute_now(later, collected.append)
    assert [leaf.grad for leaf in leaves] == [None, None] and len(collected) == 4 * is_split
    return [place.sum for place in places], [[gradients[number] for gradients in wanted] for number in (1, 2)]


@pytest.mark.parametrize("empty", [(), (0, 3)])
@pytest.mark.parametrize("is_split", [False, True])
def test_weight_gradients_land_in_their_sums_to_the_bit(is_split, empty, poisoned_memory):
    for total, (first, second) in zip(*landed_gradients("torch", is_split=is_split, empty=empty), strict=True):
        assert torch.equal(total, first + second)


@pytest.mark.parametrize(("empty", "as_rows"), [((), False), ((0, 3), False), ((), True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weight_gradients_that_are_computed_later_are_the_same_to_the_bit(dtype, empty, as_rows, poisoned_memory):
    whole, split = split_gradients("torch", dtype, empty=empty, as_rows=as_rows)
    assert all(torch.equal(one, other) for one, other in zip(whole, split))


def run_with_lost_choices(backend, dtype, activation, kept, room=None):
    """Output and gradients of 9 tokens with 3 of 5 experts each, of which all but `kept` choices are lost.

    `room`: places for choices, of which only the device knows how many are filled.
    """
    generator = torch.Generator().manual_seed(5)

    def make(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    rows = 12 if activation == "swiglu" else 6
    leaves = make(9, 7), make(9, 3), make(5, rows, 7), make(5, 7, 6)
    ids = torch.rand(9, 5, generator=generator).topk(3).indices
    ids.view(-1)[torch.randperm(27, generator=generator)[kept:]] = 5
    x, weights, up, down = leaves
    used = weights if room is None else torch.where(ids < 5, weights, 0.0)
    count, is_bound = (kept, False) if room is None else (room, True)
    y = expert_feed_forward(
        x, ids, used, up, down, activation=activation, count=count, is_bound=is_bound, backend=backend
    )
    slope = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).to(dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, leaves, slope)]


@pytest.mark.parametrize("activation", ["swiglu", "squared_relu"])
@pytest.mark.parametrize("kept", [0, 1, 16, 27])
def test_lost_choices_add_nothing_and_get_no_gradient(kept, activation, poisoned_memory):
    wanted = run_with_lost_choices("reference", torch.float64, activation, kept)
    actual = run_with_lost_choices("torch", torch.float64, activation, kept)
    for name, one, other in zip(("y", "dx", "d_weights", "d_up", "d_down"), actual, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=name)
    assert int((actual[2] != 0).sum()) <= kept


@pytest.mark.parametrize(("kept", "room"), [(0, 4), (16, 16), (16, 21), (27, 27)])
def test_places_that_no_choice_fills_change_no_bit(kept, room, poisoned_memory):
    wanted = run_with_lost_choices("torch", torch.float32, "swiglu", kept)
    for one, other in zip(run_with_lost_choices("torch", torch.float32, "swiglu", kept, room), wanted, strict=True):
        assert_bitwise(one, other)


@pytest.mark.parametrize("activation", ["swiglu", "swiglu_oai@1.5", "squared_relu", "gelu", "gelu_tanh"])
def test_gradients_of_the_torch_path_pass_gradcheck(activation):
    torch.manual_seed(1)
    width = 2 if activation in PLAIN else 4
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    up = torch.randn(3, width, 3, dtype=torch.float64, requires_grad=True)
    down = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 2], [2, 0], [0, 2], [2, 0], [0, 2]])  # expert 1 stays empty

    def compute(x, up, down, logits):
        weights = logits.sigmoid().gather(1, ids)
        return expert_feed_forward(x, ids, weights, up, down, activation=activation)

    assert torch.autograd.gradcheck(compute, (x, up, down, logits))
    counts = torch.tensor([2, 0, 3])
    assert torch.autograd.gradcheck(
        lambda x, up, down: grouped_feed_forward(x, counts, up, down, activation=activation), (x, up, down)
    )


def test_gradients_of_the_torch_router_pass_gradcheck():
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda logits: route(logits, None, score="softmax", top_k=2, normalize=True, scaling=2.0).weights_RK, (logits,)
    )


def test_grouped_feed_forward_is_the_expert_path_without_gather_and_weights():
    torch.manual_seed(2)
    x, up, down = torch.randn(12, 8), torch.randn(4, 16, 8), torch.randn(4, 8, 8)
    ids = torch.randint(0, 4, (12, 1))
    groups = group_by_expert(ids, 4)
    sorted_y = grouped_feed_forward(x[groups.token_ids], groups.counts_E, up, down, activation="swiglu")
    whole = expert_feed_forward(x, ids, torch.ones(12, 1), up, down, activation="swiglu")
    torch.testing.assert_close(sorted_y, whole[groups.token_ids], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ["swiglu", "swiglu_oai@1.5", "squared_relu", "gelu", "gelu_tanh"])
def test_grouped_products_of_a_card_compute_what_the_loop_does(activation, monkeypatch):
    """PyTorch's grouped product computes on CPUs too, so that the path of GPUs is compared with the loop here."""
    sizes = {"tokens": 40, "model": 16, "hidden": 8, "experts": 6, "empty": (0, 3, 5)}
    _, wanted = run("torch", torch.float32, activation=activation, **sizes)
    monkeypatch.setattr(torch_impl, "takes_grouped", lambda *_: True)
    _, got = run("torch", torch.float32, activation=activation, **sizes)
    for name, one, other in zip(("y", "dx", "d_up", "d_down", "d_logits"), got, wanted):
        assert relative_rms(one, other) <= 1e-5, name


def test_an_operand_behind_an_odd_number_of_others_is_not_given_to_the_grouped_product():
    flat = torch.zeros(3 * 8 * 16 + 9, dtype=torch.bfloat16)
    assert [begins_aligned(flat[start:].narrow(0, 0, 384).view(3, 8, 16)) for start in (0, 1, 4, 8)] == [
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(
    "sizes", [{}, {"tokens": 300, "experts": 3}, {"tokens": 40, "experts": 6, "empty": (0, 3, 5)}, {"tokens": 1}]
)
def test_bfloat16_stays_within_the_rounding_of_its_inputs(sizes, poisoned_memory):
    _, wanted = run("reference", torch.float64, model=32, hidden=16, **sizes)
    _, got = run("torch", torch.bfloat16, model=32, hidden=16, **sizes)
    for name, one, other in zip(("y", "dx", "d_up", "d_down", "d_logits"), got, wanted):
        assert relative_rms(one, other) < 2e-2, name  # 8 bits of mantissa, inputs and output rounded


def test_sorting_on_cpu_is_the_stable_sort_whatever_the_number_of_ids():
    torch.manual_seed(9)
    for limit in (1, 7, 32767, 32768, 100_000):
        ids = torch.randint(0, limit, (3000,))
        ids[::3] = limit - 1
        assert torch.equal(sort_stably(ids, limit), ids.argsort(stable=True))
    assert sort_stably(torch.empty(0, dtype=torch.int32), 5).shape == (0,)


def test_ranks_of_a_token_are_named_once_in_order_and_lost_choices_name_none():
    ids = torch.tensor([[7, 0, 1, 6], [3, 2, 8, 8], [8, 8, 8, 8]])
    assert choose_ranks(ids, 2, 4).tolist() == [[0, 3, 4, 4], [1, 4, 4, 4], [4, 4, 4, 4]]
    assert choose_ranks(ids, 4, 2).tolist() == [[0, 1], [0, 2], [2, 2]]
    assert choose_ranks(ids[:0], 4, 2).shape == (0, 2)


def test_grouping_is_stable_and_counts_every_pair():
    ids = torch.tensor([[2, 0], [0, 2], [2, 1]])
    groups = group_by_expert(ids, 4)
    assert groups.order.tolist() == [1, 2, 5, 0, 3, 4]
    assert groups.token_ids.tolist() == [0, 1, 2, 0, 1, 2]
    assert groups.counts_E.tolist() == [2, 1, 3, 0]
    assert groups.offsets_E.tolist() == [2, 3, 6, 6]


def test_bad_input_is_refused_with_what_was_expected():
    x, up, down = torch.randn(4, 8), torch.randn(6, 10, 8), torch.randn(6, 8, 5)
    with pytest.raises(ValueError, match="activation"):
        grouped_feed_forward(x, torch.zeros(6, dtype=torch.int64), up, down, activation="relu")
    with pytest.raises(ValueError, match="down_EDF must have shape"):
        grouped_feed_forward(x, torch.zeros(6, dtype=torch.int64), up, down.mT, activation="swiglu")
    with pytest.raises(ValueError, match="must add up to the 4 rows"):
        grouped_feed_forward(x, torch.zeros(6, dtype=torch.int64), up, down, activation="swiglu")


def test_registration_is_complete():
    torch.manual_seed(7)
    up, down = torch.randn(4, 16, 8, requires_grad=True), torch.randn(4, 8, 8, requires_grad=True)
    groups = group_by_expert(torch.randint(0, 4, (6, 2)), 4)
    weights = torch.rand(12, requires_grad=True)
    for x in (torch.randn(6, 8), torch.randn(8, 6).T):
        arguments = x.requires_grad_(), weights, groups.token_ids, groups.offsets_E, up, down, "swiglu"
        assert_registered(torch_impl._forward, *arguments)


def test_compiled_graphs_contain_the_whole_operation():
    torch.manual_seed(6)
    x, up, down, logits = torch.randn(9, 8), torch.randn(4, 16, 8), torch.randn(4, 8, 8), torch.randn(9, 4)

    def compute(x, up, down, logits):
        routing = route(logits, None, score="softmax", top_k=2, normalize=True, scaling=1.0)
        return expert_feed_forward(x, routing.expert_ids_RK, routing.weights_RK, up, down, activation="swiglu")

    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, up, down, logits), compute(x, up, down, logits))
