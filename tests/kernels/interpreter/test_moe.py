"""The Triton router and experts in the interpreter against the one-expert-at-a-time definition."""

import pytest
import torch

from amfm.kernels.moe import counting_sort, recycling, triton_experts, triton_router
from amfm.kernels.moe.capacity import drop_overflow, recycle_overflow
from amfm.kernels.moe.counting_sort import sort_pairs
from amfm.kernels.moe.op import expert_feed_forward, group_by_expert, grouped_feed_forward, route
from amfm.kernels.moe.rows import triton_impl as rows_triton
from amfm.kernels.moe.rows.op import (
    add_choices,
    combine_choices,
    gather_choices,
    put_in_slots,
    row_bytes,
    sort_choices,
    sort_rows,
)
from amfm.kernels.moe.triton_products import launch_persistent, takes_descriptors
from amfm.kernels.runtime import product_backend
from amfm.kernels.runtime.backend import triton_version
from benchmarks.kernels.counting import count_launches
from tests.helpers.numbers import assert_all_near, assert_bitwise
from tests.helpers.registration import assert_registered
from tests.kernels.interpreter.products import multiply_term_by_term
from tests.kernels.test_moe import landed_gradients, run, run_with_lost_choices, split_gradients

FLOAT32 = 1e-5  # products over some fifty terms; a softmax's gradient cancels


SIZES = [
    {"tokens": 1},
    {"tokens": 63, "top_k": 1},
    {"tokens": 10, "experts": 9, "top_k": 8},
    {"tokens": 7, "experts": 1, "top_k": 1},
    {"tokens": 40, "experts": 6, "empty": (0, 3, 5)},
    {"tokens": 17, "model": 50, "hidden": 37, "score": "sigmoid"},
]


@pytest.mark.parametrize(
    ("sizes", "activation"),
    [
        *((sizes, "swiglu") for sizes in SIZES),
        (SIZES[0] | {"hidden": 5}, "swiglu_oai@0.7"),
        pytest.param(SIZES[-1], "swiglu_oai@0.7", marks=pytest.mark.slow),
        *((sizes, "squared_relu") for sizes in SIZES[:2]),
        *((SIZES[0] | {"hidden": 5}, activation) for activation in ("gelu", "gelu_tanh")),
        *(pytest.param(SIZES[-1], activation, marks=pytest.mark.slow) for activation in ("gelu", "gelu_tanh")),
        *(pytest.param(sizes, "squared_relu", marks=pytest.mark.slow) for sizes in SIZES[2:]),
    ],
)
def test_experts_equal_the_definition_twice_bitwise(sizes, activation, twice, poisoned_memory):
    wanted_routing, wanted = run("reference", torch.float64, activation=activation, **sizes)
    routing, once = twice(lambda: run("triton", torch.float32, activation=activation, **sizes))
    assert torch.equal(routing.expert_ids_RK, wanted_routing.expert_ids_RK)
    assert torch.equal(routing.counts_E, wanted_routing.counts_E)
    assert_all_near(once, wanted, FLOAT32, ["y", "dx", "d_up", "d_down", "d_logits"])


def test_experts_by_pytorch_between_our_kernels_equal_the_definition(monkeypatch, poisoned_memory):
    monkeypatch.setattr(product_backend, "_TOLD", ["torch"])
    _, wanted = run("reference", torch.float64, tokens=40, experts=6, empty=(0, 3, 5))
    with count_launches() as launches:
        _, once = run("triton", torch.float32, tokens=40, experts=6, empty=(0, 3, 5))
    assert_all_near(once, wanted, FLOAT32, ["y", "dx", "d_up", "d_down", "d_logits"])
    kernels = {launch.kernel for launch in launches}
    assert {"spread_rows_kernel", "sum_choices_kernel"} <= kernels and "up_kernel" not in kernels


@pytest.mark.parametrize(("kept", "activation"), [(0, "swiglu"), (16, "swiglu"), (16, "squared_relu")])
def test_lost_choices_add_nothing_and_get_no_gradient_twice_bitwise(kept, activation, twice, poisoned_memory):
    wanted = run_with_lost_choices("reference", torch.float64, activation, kept)
    once = twice(lambda: run_with_lost_choices("triton", torch.float32, activation, kept))
    assert_all_near(once, wanted, FLOAT32, ["y", "dx", "d_weights", "d_up", "d_down"])


@pytest.mark.parametrize(("kept", "room"), [(0, 4), (16, 21), (27, 27)])
def test_places_that_no_choice_fills_change_no_bit(kept, room, poisoned_memory):
    wanted = run_with_lost_choices("triton", torch.float32, "squared_relu", kept)
    found = run_with_lost_choices("triton", torch.float32, "squared_relu", kept, room)
    for one, other in zip(found, wanted, strict=True):
        assert_bitwise(one, other)


def test_places_that_no_choice_fills_add_nothing_to_products_of_pytorch(monkeypatch, poisoned_memory):
    monkeypatch.setattr(product_backend, "_TOLD", ["torch"])
    wanted = run_with_lost_choices("reference", torch.float64, "swiglu", 16)
    found = run_with_lost_choices("triton", torch.float32, "swiglu", 16, 21)
    assert_all_near(found, wanted, FLOAT32, ["y", "dx", "d_weights", "d_up", "d_down"])


@pytest.mark.parametrize(("empty", "as_rows"), [((1,), False), ((), True)])
def test_weight_gradients_that_are_computed_later_are_the_same_to_the_bit(empty, as_rows, poisoned_memory):
    whole, split = split_gradients("triton", torch.float32, experts=3, empty=empty, as_rows=as_rows)
    for one, other in zip(whole, split):
        assert_bitwise(one, other)


@pytest.mark.parametrize(
    ("is_split", "empty", "width"),
    [pytest.param(False, (0, 3), 37, marks=pytest.mark.slow), (False, (0,), 17), (True, (), 8)],
)
def test_weight_gradients_land_in_their_sums_to_the_bit(is_split, empty, width, poisoned_memory):
    found = landed_gradients("triton", is_split=is_split, empty=empty, width=width)
    for total, (first, second) in zip(*found, strict=True):
        assert_bitwise(total, first + second)


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
        ((33, 24), "sqrt_softplus", 4, (4, 2), True),
    ],
)
def test_router_equals_the_definition_twice_bitwise_and_breaks_ties_to_the_lowest(
    shape, score, top_k, groups, bias, ties, twice, poisoned_memory
):
    generator = torch.Generator().manual_seed(shape[0])
    logits = torch.randn(shape, generator=generator) * 3
    logits = logits.round() if ties else logits
    biases = torch.randn(shape[1], generator=generator) * 0.3 if bias else None
    settings = {"score": score, "top_k": top_k, "normalize": top_k > 1, "scaling": 2.5}
    settings |= {"num_groups": groups[0], "group_top_k": groups[1]}
    wanted_routing, wanted = run_router("reference", logits.double(), biases, settings)
    routing, got = twice(lambda: run_router("triton", logits, biases, settings))
    assert torch.equal(routing.expert_ids_RK, wanted_routing.expert_ids_RK)
    assert torch.equal(routing.counts_E, wanted_routing.counts_E)
    assert_all_near(got, wanted, FLOAT32, ["weights", "scores", "d_logits"])


def test_groups_are_ranked_by_one_or_three_experts_as_the_definition_ranks_them() -> None:
    logits = torch.randn(40, 24, generator=torch.Generator().manual_seed(6))
    for merit in (1, 3, 9):  # more than a group has: all of them
        settings = {"score": "sigmoid", "top_k": 4, "normalize": True, "scaling": 1.0}
        settings |= {"num_groups": 6, "group_top_k": 2, "group_merit": merit}
        ids = [run_router(backend, logits, None, settings)[0].expert_ids_RK for backend in ("triton", "reference")]
        assert torch.equal(*ids)


@pytest.mark.parametrize("activation", ["swiglu", pytest.param("squared_relu", marks=pytest.mark.slow)])
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


def test_rows_in_another_order_are_read_and_written_where_they_lie(poisoned_memory):
    torch.manual_seed(2)
    x, up, down = (torch.randn(*shape, requires_grad=True) for shape in ((21, 8), (4, 16, 8), (4, 8, 8)))
    experts = torch.tensor([3, 0, 2, 2, 0, 2, 2])[torch.randint(0, 7, (21,))]
    counts = torch.bincount(experts, minlength=4)
    results = []
    for backend in ("reference", "triton", "triton"):
        sources = sort_rows(experts, 4, backend=backend)
        y = grouped_feed_forward(x, counts, up, down, activation="swiglu", sources_R=sources, backend=backend)
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, up, down))])
    assert_all_near(results[1], results[0], FLOAT32)
    for one, other in zip(*results[1:]):
        assert_bitwise(one, other)


@pytest.mark.skipif(triton_version() < (3, 7, 0), reason="this Triton's interpreter cannot load by descriptors")
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("scatters", [False, True])
def test_the_persistent_product_equals_the_one_of_the_default(is_transposed, scatters, poisoned_memory):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(45, 40, generator=generator)
    weight = torch.randn(3, 48, 40, generator=generator)
    if is_transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    offsets = torch.tensor([17, 17, 45], dtype=torch.int32)
    if x.device.type == "cuda" and not takes_descriptors(x, weight):
        pytest.skip("this GPU has no copy engine")
    tile = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16}
    tiles = counting_sort.list_tiles(offsets, 45, 16)
    sources = torch.randperm(45, generator=generator).int() if scatters else None
    y = torch.full((45, 48), torch.nan)
    launch_persistent(x, weight, y, sources, tiles, tile | {"num_warps": 4, "num_stages": 1})
    wanted = torch.cat([x[:17].double() @ weight[0].double().t(), x[17:].double() @ weight[2].double().t()])
    assert_all_near([y if sources is None else y[sources.long()]], [wanted], FLOAT32)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"), [(1, 1, 1), (50, 2, 5), (100, 3, 20), (33, 8, 9), (1100, 2, 3)]
)
def test_pairs_are_sorted_as_by_a_stable_sort(tokens, top_k, experts, poisoned_memory):
    ids = torch.randint(0, experts, (tokens, top_k), generator=torch.Generator().manual_seed(tokens))
    ids[ids == 1] = 0  # an expert that no one chose
    wanted, pairs = group_by_expert(ids, experts), sort_pairs(ids, experts)
    for got, expected in (
        (pairs.pairs, wanted.order),
        (pairs.tokens, wanted.token_ids),
        (pairs.counts_E, wanted.counts_E),
        (pairs.offsets_E, wanted.offsets_E),
        (pairs.places, wanted.order.argsort()),
    ):
        assert torch.equal(got.long(), expected.long())


def test_sorting_twice_the_pairs_reads_no_more_counts_of_blocks():
    """Each program reads the counts of all blocks, so with blocks of one size reads would be four times as many."""
    reads = []
    for tokens in (1024, 2048):
        with count_launches() as launches:
            sort_pairs(torch.arange(tokens)[:, None] % 3, 3)
        reads.append(launches[1].traffic["counts"].requested_read)
    assert reads[1] <= reads[0]


@pytest.mark.parametrize("lost", [0, 7])
def test_rows_by_choice_equal_the_definition_twice_bitwise(lost, poisoned_memory):
    """Rows [S, D] of choices that are sent: the last expert's are not where it stands for lost choices."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 4, (19, 3), generator=generator)
    ids.view(-1)[:lost] = 4
    count = int((ids < 4).sum())
    wide = torch.randn(19, 70, generator=generator, dtype=torch.float64)
    results = []
    for backend, dtype in (("torch", torch.float64), ("triton", torch.float32), ("triton", torch.float32)):
        x = wide.to(dtype).requires_grad_()
        weights = torch.linspace(-1, 1, 57, dtype=dtype).view(19, 3).requires_grad_()
        choices = sort_choices(ids, 5, backend=backend)
        rows = gather_choices(x, choices, count, 3)
        factor = torch.linspace(1, 2, rows.numel(), dtype=torch.float64).to(dtype).view(rows.shape)
        y = combine_choices(rows * factor, choices, weights)
        added = add_choices(rows * factor, choices, 19, 3)
        (d_rows,) = torch.autograd.grad(added.square().sum(), rows, retain_graph=True)
        results.append([rows, y, added, d_rows, *torch.autograd.grad(y.square().sum(), (x, weights))])
    assert_all_near(results[1], results[0], FLOAT32, ["rows", "y", "added", "d_rows", "dx", "d_weights"])
    for one, other in zip(*results[1:]):
        assert_bitwise(one, other)


@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_slots_hold_the_rows_of_choices_and_zeros_in_gaps(parts, poisoned_memory):
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 4, (19, 3), generator=generator)
    ids.view(-1)[5:12] = 4  # lost
    slots = int(torch.bincount(ids.flatten()[ids.flatten() < 4]).max()) + 2
    slots += slots % parts
    wide = torch.randn(19, 70, generator=generator, dtype=torch.float64)
    results, gaps = [], None
    for backend, dtype in (("torch", torch.float64), ("triton", torch.float32), ("triton", torch.float32)):
        x = wide.to(dtype).requires_grad_()
        weights = torch.linspace(-1, 1, 57, dtype=dtype).view(19, 3).requires_grad_()
        choices = put_in_slots(sort_choices(ids, 5, backend=backend), ids, slots, parts)
        rows = gather_choices(x, choices, 4 * slots, 3)
        gaps = choices.order == 57 if gaps is None else gaps
        if backend == "torch":
            # Each part has an equal share of every expert's slots, filled ones first.
            expert_PEN = ids.flatten()[choices.order.clamp(max=56)].view(parts, 4, -1)
            is_filled_PEN = ~gaps.view(parts, 4, -1)
            assert ((expert_PEN == torch.arange(4)[:, None]) | ~is_filled_PEN).all()
            assert (is_filled_PEN[0] | ~is_filled_PEN[-1]).all()
        factor = torch.linspace(1, 2, rows.numel(), dtype=torch.float64).to(dtype).view(rows.shape)
        y = combine_choices(rows * factor, choices, weights)
        gradients = torch.autograd.grad(y.square().sum(), (x, weights, rows))
        results.append([y, *gradients, rows[~gaps]])
        assert not gradients[2][gaps].any()
        assert backend == "torch" or not rows[gaps].any()
    assert_all_near(results[1], results[0], FLOAT32, ["y", "dx", "d_weights", "d_rows", "rows"])
    for one, other in zip(*results[1:]):
        assert_bitwise(one, other)


@pytest.mark.parametrize(("tokens", "capacity"), [(1, 1), (70, 1), (70, 40), (70, 70), (0, 3)])
def test_choices_over_capacity_are_those_of_the_definition(tokens, capacity, poisoned_memory):
    ids = torch.randint(0, 5, (tokens, 3), generator=torch.Generator().manual_seed(tokens))
    ids[tokens // 2 :] %= 2  # two experts overflow, across blocks
    for choices in (ids, ids.int(), ids.t().contiguous().t()):
        limited = drop_overflow(choices, 5, capacity, backend="triton")
        assert torch.equal(limited, drop_overflow(choices, 5, capacity)), limited
        assert limited.dtype == choices.dtype


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "capacity"),
    [
        (1, 1, 1, 1),
        (7, 2, 5, 3),
        pytest.param(63, 3, 8, 30, marks=pytest.mark.slow),
        (40, 1, 2, 12),
        pytest.param(33, 8, 16, 17, marks=pytest.mark.slow),
        pytest.param(90, 2, 13, 14, marks=pytest.mark.slow),
        (20, 2, 4, 40),
    ],
)
def test_recycled_choices_are_drawn_as_the_definition_draws_in_three_launches(
    tokens, top_k, experts, capacity, poisoned_memory
):
    # Chosen by falling chances: the first experts overflow, the last have room or no one; also with too little room for
    # all.
    generator = torch.Generator().manual_seed(tokens)
    chances = torch.linspace(1, 0.02, experts).pow(3).expand(tokens, -1)
    ids = torch.multinomial(chances, top_k, generator=generator)
    seed = torch.tensor(12345678901)
    wanted = recycle_overflow(ids, experts, capacity, seed)
    for choices in (ids, ids.int().t().contiguous().t()):
        with count_launches() as launches:
            recycled = recycle_overflow(choices, experts, capacity, seed, backend="triton")
        assert len(launches) == 3
        assert torch.equal(recycled, wanted.to(choices.dtype)) and recycled.dtype == choices.dtype


def test_nothing_sent_gives_zeros(poisoned_memory):
    x, weights = torch.randn(3, 8, requires_grad=True), torch.rand(3, 2, requires_grad=True)
    choices = sort_choices(torch.full((3, 2), 4), 5, backend="triton")
    y = combine_choices(gather_choices(x, choices, 0, 2), choices, weights)
    assert torch.equal(y, torch.zeros(3, 8))
    assert all(not gradient.any() for gradient in torch.autograd.grad(y.sum(), (x, weights)))


def test_rows_by_choice_move_their_minimum():
    x, weights = torch.randn(64, 128).bfloat16().requires_grad_(), torch.rand(64, 4, requires_grad=True)
    choices = sort_choices(torch.arange(256).view(64, 4) % 8, 8, backend="triton")
    with count_launches() as launches:
        rows = gather_choices(x, choices, 256, 4)
        y = combine_choices(rows, choices, weights)
        forward = len(launches)
        torch.autograd.grad(y, (x, weights), torch.ones_like(y))
    moved = [sum(launch.distinct_bytes for launch in part) for part in (launches[:forward], launches[forward:])]
    assert moved[0] <= 1.1 * row_bytes(64, 256, 128)
    # Backward also reads the rows again for the gradients of the weights.
    assert moved[1] <= 1.1 * (row_bytes(64, 256, 128) + 2 * 256 * 128)


def test_rows_of_nan_still_name_experts():
    routing = route(
        torch.full((2, 5), float("nan")), None, score="sigmoid", top_k=2, normalize=True, scaling=1.0, backend="triton"
    )
    assert int(routing.expert_ids_RK.max()) < 5 and int(routing.expert_ids_RK.min()) >= 0


def test_registration_is_complete():
    torch.manual_seed(3)
    logits, bias = torch.randn(6, 4, requires_grad=True), torch.randn(4)
    assert_registered(triton_router._forward, logits, bias, "softmax", 2, True, 1.0, 2, 1, 2)
    x, up, down = (torch.randn(*shape, requires_grad=True) for shape in ((6, 8), (4, 16, 8), (4, 8, 8)))
    weights = torch.rand(6, 2, requires_grad=True)
    ids = torch.randint(0, 4, (6, 2))
    assert_registered(counting_sort._sort, ids, 4)
    assert_registered(counting_sort.limit_pairs, ids, 4, 2)
    assert_registered(recycling.recycle_pairs, ids, 4, 2, torch.tensor(1), 4)
    pairs = sort_pairs(ids, 4)
    sorting = pairs.pairs, pairs.tokens, pairs.places, pairs.offsets_E
    assert_registered(triton_experts._forward, x, weights, *sorting, up, down, "swiglu", 12)
    rows = sort_pairs(ids[:, :1], 4)
    assert_registered(
        triton_experts._forward, x, None, None, rows.pairs, None, rows.offsets_E, up, down, "swiglu_oai@7.0", 6
    )
    assert_registered(rows_triton._spread, x, pairs.places, 12, 2, None)
    assert_registered(
        rows_triton._add, torch.randn(12, 8, requires_grad=True), pairs.places, 6, 2, torch.zeros(12, dtype=torch.bool)
    )
    assert_registered(rows_triton._combine, torch.randn(12, 8, requires_grad=True), pairs.places, weights, None)
