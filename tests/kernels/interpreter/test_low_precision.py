"""fp8_block's kernels in the interpreter: codes bitwise of formats.py, products of decoded operands, linear in all three."""

import pytest
import torch

from amfm.kernels.common.weight_gradients import Later, compute_now, split_backward
from amfm.kernels.linear.op import linear
from amfm.kernels.low_precision import triton_impl
from amfm.kernels.low_precision.formats import quantize, to_e8m0
from amfm.kernels.low_precision.products import multiplies_codes
from amfm.kernels.low_precision.recipe import NAMES, Recipe, keep_weights
from amfm.kernels.moe import triton_codes, triton_epilogues, triton_only_expert
from amfm.kernels.moe.counting_sort import list_tiles
from amfm.kernels.moe.low_precision import makes_codes
from amfm.kernels.moe.op import expert_feed_forward, grouped_feed_forward
from amfm.kernels.swiglu.gate import PLAIN
from benchmarks.kernels.counting import count_launches
from tests.helpers.gradient_place import Place
from tests.helpers.numbers import assert_all_near, assert_bitwise, assert_near
from tests.helpers.registration import assert_registered
from tests.kernels.interpreter.products import scaled_products
from tests.kernels.moe.test_only_expert import NAMES as ONLY_NAMES
from tests.kernels.moe.test_only_expert import check_sums_and_split, only_leaves, run_only

EXACT = 1e-6  # float32 products of decoded operands


def by_rows(codes):
    """Codes and scales as formats.py has them."""
    return codes.codes, codes.scales.t()


def by_columns(codes, counts):
    """The same of each expert's columns: its tiles side by side, without the lanes behind its last row, which are zeros."""
    first = 0
    for count in counts:
        tiles = slice(first, first := first - (-count // 128))
        joined = codes.codes[tiles].permute(1, 0, 2).flatten(1)
        assert not joined[:, count:].any()
        yield joined[:, :count], codes.scales[tiles].t()


def assert_same(found, wanted):
    for ours, exact in zip(found, (wanted.codes, wanted.scales), strict=True):
        assert_bitwise(ours.contiguous(), exact.contiguous())


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (130, 96), (200, 192)])
def test_codes_of_rows_columns_and_weights_are_the_definitions_to_the_bit(rows, width, poisoned_memory):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator) * torch.logspace(-6, 6, rows)[:, None]
    if rows > 1:
        x[3], x[4], x[6, 8], x[7, 9] = 0.0, 1e-40, torch.nan, -torch.inf
    along, across = triton_impl.quantize_rows(x, rows=True, columns=True)
    assert_same(by_rows(along), quantize(x, "fp8_block"))
    assert_same(next(by_columns(across, [rows])), quantize(x.t(), "fp8_block"))
    wanted = quantize(x, "fp8_block", weight=True)
    for transposed in (False, True):
        found = triton_impl.quantize_weight(x, transposed=transposed)
        exact = (wanted.codes.t(), wanted.scales.t()) if transposed else (wanted.codes, wanted.scales)
        with keep_weights():  # both ways in one pass
            kept = triton_impl.quantize_weight(x, transposed=transposed)
            assert triton_impl.quantize_weight(x, transposed=transposed).codes is kept.codes
        for made in (found, kept):
            assert_bitwise(made.codes[0], exact[0].contiguous())
            assert_bitwise(made.scales[0], exact[1].contiguous())


def test_every_bfloat16_number_has_the_code_of_the_definition():
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    # As 32 wide rows: scales from the smallest to those of infinity. The interpreter widens subnormal bfloat16 numbers to zero.
    x = every[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))].view(512, 128)
    x = torch.where(x.abs() < 2.0 ** torch.arange(-130, 126).repeat_interleave(2)[:, None], x, 1e-39)
    along, _ = triton_impl.quantize_rows(x, rows=True)
    assert_same(by_rows(along), quantize(x, "fp8_block"))


def tiled(counts):
    ends = torch.tensor(counts).cumsum(0).int()
    return triton_impl.Tiles(list_tiles(ends, sum(counts), 128), ends)


COUNTS = [130, 0, 5, 128]


@pytest.mark.parametrize("activation", ["", "swiglu", "squared_relu"])
def test_tiles_span_no_two_experts_and_rows_are_gathered_activated_and_weighed(activation, poisoned_memory):
    generator = torch.Generator().manual_seed(0)
    total, width = sum(COUNTS), 40
    x = torch.randn(70, width * (2 if activation == "swiglu" else 1), generator=generator)
    sources = torch.randint(70, (total,), generator=generator).int()
    weights, pairs = torch.rand(total, generator=generator), torch.randperm(total, generator=generator).int()
    how = {"weights": weights, "pairs": pairs} if activation else {}
    along, across = triton_impl.quantize_rows(
        x, tiled(COUNTS), sources, rows=True, columns=True, activation=activation, **how
    )
    taken = x[sources]
    if activation == "swiglu":
        taken = (taken[:, :width] * (1 / (1 + torch.exp(-taken[:, :width])))) * taken[:, width:]
    elif activation:
        taken = taken.relu().square()
    taken = taken * weights[pairs][:, None] if activation else taken
    begin = 0
    codes, scales = by_rows(along)
    for count, columns in zip(COUNTS, by_columns(across, COUNTS), strict=True):
        place = slice(begin, begin := begin + count)
        if not count:
            continue
        wanted, wanted_columns = quantize(taken[place], "fp8_block"), quantize(taken[place].t(), "fp8_block")
        if activation != "swiglu":
            assert_same((codes[place], scales[place]), wanted)
            assert_same(columns, wanted_columns)
        else:  # an exponential of another library: one code in thousands is its neighbour
            assert (codes[place] != wanted.codes).float().mean() < 0.01
            assert (columns[0] != wanted_columns.codes).float().mean() < 0.01
            assert_near(scales[place], wanted.scales.double(), EXACT)


@pytest.mark.parametrize("inner", [200, pytest.param(16, marks=pytest.mark.slow)])
def test_products_are_those_of_decoded_operands_of_each_expert(inner, poisoned_memory):
    generator = torch.Generator().manual_seed(0)
    total, outputs = sum(COUNTS), 144
    x, other = torch.randn(total, inner, generator=generator), torch.randn(total, outputs, generator=generator)
    weight = torch.randn(len(COUNTS), outputs, inner, generator=generator)
    tiles, sources = tiled(COUNTS), torch.randperm(total, generator=generator).int()
    rows, columns = triton_impl.quantize_rows(x, tiles, rows=True, columns=True)
    _, other_columns = triton_impl.quantize_rows(other, tiles, columns=True)
    codes = triton_impl.quantize_weight(weight)
    y = triton_impl.product(rows, codes, torch.float32, tiles, sources)
    outer = triton_impl.weight_gradient(other_columns, columns, total, torch.float32, None, tiles)
    place = Place.of(weight)
    for _ in range(2):
        assert triton_impl.weight_gradient(other_columns, columns, total, torch.float32, place, tiles) is None
    begin = 0
    for expert, count in enumerate(COUNTS):
        part = slice(begin, begin := begin + count)
        matrix = quantize(weight[expert], "fp8_block", weight=True).values().double()
        if count:
            exact = quantize(x[part], "fp8_block").values().double() @ matrix.t()
            assert_near(y[sources[part].long()], exact, EXACT)
            left, right = (quantize(side[part].t(), "fp8_block").values().double() for side in (other, x))
            assert_near(outer[expert], left @ right.t(), EXACT)
        else:
            assert not outer[expert].any()
        assert_near(place.sum[expert], 2 * outer[expert].double(), EXACT)


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "options"),
    [
        pytest.param((1, 1), 144, 136, {"name": "fp8_block"}, marks=pytest.mark.slow),
        ((2, 70), 144, 136, {"name": "fp8_block"}),
        pytest.param((2, 70), 144, 136, {"name": "fp8_block", "weight_gradient": "bf16"}, marks=pytest.mark.slow),
        pytest.param((2, 70), 160, 96, {"name": "mxfp8"}, marks=[scaled_products, pytest.mark.slow]),
        pytest.param((2, 70), 160, 96, {"name": "nvfp4", "seed": 77}, marks=[scaled_products, pytest.mark.slow]),
        ((1, 1), 144, 136, {"name": "fp8_block", "weight_gradient": "bf16"}),
    ],
)
def test_linear_by_codes_is_the_emulation_twice_bitwise_and_lands_and_splits(
    rows, inputs, outputs, options, twice, poisoned_memory
):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, inputs, generator=generator).requires_grad_()
    weight = torch.randn(outputs, inputs, generator=generator).requires_grad_()
    grad = torch.randn(*rows, outputs, generator=generator)

    def run(**more):
        x.grad = weight.grad = None
        weight.recipe = Recipe(**options, **more)
        y = linear(x, weight)
        y.backward(grad)
        return y.detach(), x.grad, weight.grad

    once, emulated = twice(run), run(emulate=True)
    for found, exact in zip(once, emulated, strict=True):
        assert_near(found, exact.double(), EXACT)
    later: Later = []
    with split_backward(later):
        assert run()[2] is None
    compute_now(later, lambda weight: None)
    assert_bitwise(weight.grad, once[2])
    place = Place.of(weight)
    run()
    assert weight.grad is None
    assert_near(place.sum, once[2].double(), EXACT)


def test_kernels_multiply_codes_of_every_recipe_and_emulation_stays_emulation():
    assert all(multiplies_codes(Recipe(name), torch.device("cpu")) for name in NAMES)
    assert not multiplies_codes(Recipe("mxfp8", emulate=True), torch.device("cpu"))


def test_registration_is_complete():
    x = torch.randn(130, 40)
    tiles = tiled([100, 30])
    assert_registered(triton_impl._quantize_rows, x, None, None, None, tiles.tiles, 2, "", True, True)
    assert_registered(triton_impl._quantize_weight, torch.randn(2, 40, 40), False, True)
    rows, columns = triton_impl.quantize_rows(x, tiles, rows=True, columns=True)
    weight = triton_impl.quantize_weight(torch.randn(2, 24, 40))
    assert_registered(
        triton_impl._product, rows.codes, rows.scales, weight.codes, weight.scales, tiles.tiles, None, torch.bfloat16
    )
    both = columns.codes, columns.scales
    assert_registered(triton_impl._outer, *both, *both, tiles.offsets_E, 130, torch.bfloat16, None, False)


EXPERTS, MODEL, WIDTH = 4, 40, 24
# Hidden rows and activations of both are float32, but added up in another order: one code in thousands is its neighbour.
FLIPPED = 2e-3


def expert_leaves(activation, tokens=150):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).requires_grad_()

    features = WIDTH if activation in PLAIN else 2 * WIDTH
    leaves = [normal(tokens, MODEL), torch.rand(tokens, 2, generator=generator).add(0.1).requires_grad_()]
    leaves += [normal(EXPERTS, features, MODEL, scale=0.2), normal(EXPERTS, MODEL, WIDTH, scale=0.2)]
    ids = torch.tensor([0, 1, 3])[torch.rand(tokens, 3, generator=generator).topk(2).indices]
    ids[:140, 0], ids[:140, 1] = 0, 3
    return ids, leaves


def set_recipe(leaves, **options):
    for weight in leaves[2:]:
        weight.recipe = Recipe("fp8_block", **options)


def run_experts(ids, leaves, activation, **how):
    for leaf in leaves:
        leaf.grad = None
    x, weights, up, down = leaves
    y = expert_feed_forward(x, ids, weights, up, down, activation=activation, **how)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).sin())
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize(("activation", "options"), [
    pytest.param("swiglu", {}, marks=pytest.mark.slow), ("squared_relu", {"weight_gradient": "bf16"}), pytest.param("swiglu_oai@1.5", {"saved": "fp8"}, marks=pytest.mark.slow),
    pytest.param("gelu_tanh", {"saved": "fp8"}, marks=pytest.mark.slow),
])  # fmt: skip
def test_experts_by_codes_are_the_emulation_twice_bitwise(activation, options, twice, poisoned_memory):
    ids, leaves = expert_leaves(activation)
    set_recipe(leaves, **options)
    once = twice(lambda: run_experts(ids, leaves, activation))
    set_recipe(leaves, emulate=True, **options)
    for found, exact in zip(once, run_experts(ids, leaves, activation), strict=True):
        assert_near(found, exact.double(), FLIPPED)
    assert not once[3][2].any() and not once[4][2].any(), "no one chose expert 2"


@pytest.mark.parametrize("options", [{}, pytest.param({"weight_gradient": "bf16"}, marks=pytest.mark.slow)])
def test_gradients_of_experts_land_and_split_and_lost_choices_add_nothing(options, poisoned_memory):
    ids, leaves = expert_leaves("swiglu", tokens=145)
    ids[7, 1] = ids[30, 0] = EXPERTS
    how = {"count": int((ids < EXPERTS).sum())}
    set_recipe(leaves, **options)
    once = run_experts(ids, leaves, "swiglu", **how)
    later: Later = []
    with split_backward(later):
        split = run_experts(ids, leaves, "swiglu", **how)
    assert split[3] is None and split[4] is None
    compute_now(later, lambda weight: None)
    for found, wanted in zip([*split[:3], leaves[2].grad, leaves[3].grad], once, strict=True):
        assert_bitwise(found, wanted)
    assert not once[2][7, 1] and not once[2][30, 0]
    places = [Place.of(weight) for weight in leaves[2:]]
    landed = run_experts(ids, leaves, "swiglu", **how)
    assert landed[3] is None and landed[4] is None
    for place, wanted in zip(places, once[3:], strict=True):
        assert_near(place.sum, wanted.double(), EXACT)
    set_recipe(leaves, emulate=True, **options)
    for weight in leaves[2:]:
        del weight.gradient_sum
    for found, exact in zip(once, run_experts(ids, leaves, "swiglu", **how), strict=True):
        assert_near(found, exact.double(), FLIPPED)


def test_rows_of_experts_are_read_and_written_where_they_lie(poisoned_memory):
    generator = torch.Generator().manual_seed(0)
    _, (_, _, up, down) = expert_leaves("swiglu")
    set_recipe([None, None, up, down])
    counts = torch.tensor([130, 0, 5, 15])
    rows = torch.randn(150, MODEL, generator=generator)
    plain = grouped_feed_forward(rows, counts, up, down, activation="swiglu")
    sources = torch.randperm(150, generator=generator)
    moved = torch.empty_like(rows).index_copy_(0, sources, rows).requires_grad_()
    y = grouped_feed_forward(moved, counts, up, down, activation="swiglu", sources_R=sources.int())
    assert_bitwise(y[sources], plain)
    y.sum().backward()
    assert moved.grad.isfinite().all() and moved.grad.abs().amax(1).min() > 0


@pytest.mark.parametrize(("activation", "width", "dtype", "saved"), [
    ("swiglu_oai@1.5", 128, torch.bfloat16, True), pytest.param("squared_relu", 200, torch.bfloat16, True, marks=pytest.mark.slow), ("swiglu", 128, torch.float32, False),
    pytest.param("gelu", 200, torch.bfloat16, True, marks=pytest.mark.slow),
])  # fmt: skip
def test_codes_made_in_epilogues_are_those_of_passes_afterwards_to_the_bit(
    activation, width, dtype, saved, poisoned_memory
):
    generator = torch.Generator().manual_seed(0)
    total, features = sum(COUNTS), width * (1 if activation in PLAIN else 2)
    assert makes_codes("fp8_block", width, activation)
    x, v = (torch.randn(total, size, generator=generator).to(dtype) for size in (72, width))
    weight = torch.randn(len(COUNTS), features, 72, generator=generator) * 0.2
    choice = torch.rand(total, generator=generator), torch.randperm(total, generator=generator).int()
    tiles = tiled(COUNTS)
    rows, matrices = triton_impl.quantize_rows(x, tiles, rows=True)[0], triton_impl.quantize_weight(weight)
    kept, active = triton_epilogues.up(rows, matrices, tiles, *choice, activation, x, saved=saved)
    found = triton_epilogues.open_codes(v, kept, *choice, tiles, activation)

    hidden = triton_impl.product(rows, matrices, dtype, tiles)
    how = {"activation": activation, "weights": choice[0], "pairs": choice[1]}
    wide = triton_impl.quantize_rows(hidden, tiles, rows=True)[0] if saved else (hidden,)
    for ours, passed in zip(
        (*kept, *active), (*wide, *triton_impl.quantize_rows(hidden, tiles, rows=True, **how)[0]), strict=True
    ):
        assert_bitwise(ours, passed)
    opened = triton_codes.open_rows(
        v, triton_codes._restore(dtype, *kept), *choice, tiles.tiles, len(COUNTS), activation
    )
    made = triton_impl.quantize_rows(opened[0], tiles, rows=True, columns=True)
    made += triton_impl.quantize_rows(opened[1], tiles, columns=True)[1:]
    used = sum(-(-count // 128) for count in COUNTS)  # of the tiles that there is room for
    for ours, passed in zip(found[:3], made, strict=True):
        columns = isinstance(ours, triton_impl.ColumnCodes)
        for one, other in zip(ours, passed, strict=True):
            assert_bitwise(*(each[:used] if columns else each for each in (one, other)))
    assert_near(found[3], opened[2].double(), EXACT)  # added up in another order


def test_a_gated_unit_that_begins_inside_a_block_takes_separate_passes():
    assert [makes_codes(name, width, activation) for name, width, activation in (
        ("fp8_block", 200, "swiglu"), ("fp8_block", 256, "swiglu"), ("mxfp8", 256, "swiglu"), ("fp8_block", 200, "squared_relu"),
    )] == [False, True, False, True]  # fmt: skip


def test_packed_rows_are_those_of_the_definition_to_the_bit(poisoned_memory):
    x = torch.randn(70, 200, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 70)[:, None]
    x[3], x[4, 7], x[5, 9] = 0.0, torch.nan, 1e-40
    packed, wanted = triton_impl.pack_rows(x), quantize(x, "fp8_block")
    assert_bitwise(packed[:, :200].contiguous(), wanted.codes)
    assert_bitwise(packed[:, 200:202].contiguous(), to_e8m0(wanted.scales))
    found = torch.empty_like(x)
    triton_impl.unpack_rows(packed, found)
    assert found[4, 7].isnan() and torch.equal(found.nan_to_num(7.0), wanted.values().nan_to_num(7.0))
    assert_registered(triton_impl.pack_rows, x)
    assert_registered(triton_impl.unpack_rows, packed, found)


@pytest.mark.parametrize(
    ("rows", "activation"), [(63, "swiglu"), (1, "squared_relu"), (0, "swiglu"), (20, "swiglu_oai@1.5"), (5, "gelu")]
)
def test_the_only_expert_is_the_definition_twice_bitwise_without_groups(rows, activation, twice, poisoned_memory):
    wanted = run_only(only_leaves(rows, activation=activation), activation=activation, backend="reference")
    leaves = only_leaves(rows, torch.float32, activation=activation)
    with count_launches() as launches:
        once = twice(lambda: run_only(leaves, activation=activation, backend="triton"))
    # Products over some fifty terms.
    assert_all_near(once, wanted, 1e-5, ONLY_NAMES)
    allowed = {"weigh_activation_kernel", "open_kernel", "list_tiles_kernel", "sum_parts_kernel"}
    assert {launch.kernel for launch in launches} <= allowed


def test_gradients_of_the_only_expert_land_and_split_to_the_bit(poisoned_memory):
    check_sums_and_split("triton", torch.float32)


def test_products_by_codes_are_those_of_the_grouped_form_to_the_bit(poisoned_memory):
    leaves = only_leaves(40, torch.float32, model=40)
    for weight in leaves[2:]:
        weight.recipe = Recipe("fp8_block")
    found = [each.clone() for each in run_only(leaves, backend="triton")]
    for one, other in zip(found, run_only(leaves, backend="triton", grouped=True), strict=True):
        assert_bitwise(one, other)


def test_the_only_experts_weight_gradients_in_high_precision_are_dense_products(poisoned_memory):
    leaves = only_leaves(40, torch.float32, model=40)
    for weight in leaves[2:]:
        weight.recipe = Recipe("fp8_block", weight_gradient="bf16")
    wanted = [each.clone() for each in run_only(leaves, backend="triton", grouped=True)]
    with count_launches() as launches:
        found = run_only(leaves, backend="triton")
    for one, other in zip(found, wanted, strict=True):
        assert_near(one, other.double(), EXACT)
    assert "grouped_outer_kernel" not in {launch.kernel for launch in launches}


def test_registration_of_the_only_expert_is_complete():
    assert_registered(triton_only_expert._weigh, torch.randn(5, 18), torch.randn(5, 1), "swiglu")
