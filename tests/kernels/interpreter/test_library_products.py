"""fp8_block's products by cuBLASLt: torch's scaled product is computed by what its documentation says of codes and scales."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from amfm.kernels.linear.op import linear
from amfm.kernels.low_precision import triton_impl
from amfm.kernels.low_precision.library_products import multiplies_by_library, takes_codes
from amfm.kernels.low_precision.recipe import Recipe
from amfm.kernels.runtime.product_backend import product_backend
from tests.helpers.gradient_place import Place
from tests.helpers.numbers import assert_all_near, assert_near
from tests.kernels.moe.test_only_expert import NAMES as ONLY_NAMES
from tests.kernels.moe.test_only_expert import only_leaves, run_only

pytest.importorskip("triton")
KINDS = torch.nn.functional.ScalingType
# float32 sums of products of codes in another order.
EXACT = 1e-6


def spread(scales, rows, inner, kind):
    """The scale of each code of [rows, inner], of scales that are laid out as cuBLASLt asks for ("Scaling factors layouts")."""
    blocks = -(-inner // 128)
    if kind == KINDS.BlockWise1x128:
        assert scales.shape == (rows, blocks) and scales.stride() == (1, rows) and rows % 4 == 0
    else:
        filled = -(-blocks // 4) * 4
        assert scales.shape == (filled, -(-rows // 128)) and scales.stride() == (1, filled)
        scales = scales[:blocks].t().repeat_interleave(128, 0)[:rows]
    assert scales.dtype == torch.float32 and inner % 128 == 0
    return scales.double().repeat_interleave(128, 1)


class ScaledProducts(TorchDispatchMode):
    """Multiplies decoded operands in float64 where torch is asked for a scaled product, and notes each."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "aten" or "_scaled_" not in func._opname:
            return func(*args, **(kwargs or {}))
        self.seen.append(func._opname)
        place, given = (args[0], args[1:]) if "addmm" in func._opname else (None, args)
        left, right, (left_scales,), (left_kind,), _, (right_scales,), (right_kind,), *_ = given
        assert left.dtype == right.dtype == torch.float8_e4m3fn
        assert left.is_contiguous() and right.t().is_contiguous() and right.shape[1] % 16 == 0
        assert left_kind == KINDS.BlockWise1x128.value
        wide = left.double() * spread(left_scales, *left.shape, KINDS.BlockWise1x128)
        product = wide @ (right.t().double() * spread(right_scales, *right.t().shape, KINDS(right_kind))).t()
        if place is None:
            return product.to(given[9])
        return place.copy_(product + place if kwargs["beta"] else product)  # which is not read otherwise


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 128, 16), (63, 640, 144), pytest.param(200, 384, 256, marks=pytest.mark.slow)]
)
def test_a_projection_equals_our_kernels_in_all_three_products(rows, inputs, outputs, poisoned_memory):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((rows, inputs), (outputs, inputs)))
    weight.recipe = Recipe("fp8_block")

    def run():
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        leaves[1].recipe = weight.recipe
        y = linear(*leaves)
        y.backward(torch.linspace(-1, 2, y.numel()).view_as(y))
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    wanted = run()
    with product_backend("torch"), ScaledProducts() as products:
        found = run()
    # dx is a sum over outputs, which stays ours if they have a broken block.
    assert products.seen == ["_scaled_mm_v2"] * (3 if outputs % 128 == 0 else 2)
    assert_all_near(found, wanted, EXACT, ["y", "dx", "dw"])


def test_weight_gradients_add_to_their_sums(poisoned_memory):
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(130, width, generator=generator) for width in (256, 48))
    columns = [triton_impl.quantize_rows(each, columns=True)[1] for each in (dy, x)]
    wanted = triton_impl.weight_gradient(*columns, 130, torch.float32, None)
    for offset, asked in ((0, "_scaled_addmm_"), (3, "_scaled_mm_v2")):
        total = torch.full((offset + 48 * 256,), torch.nan)
        place = Place(total[offset:].view(48, 256))
        with product_backend("torch"), ScaledProducts() as products:
            for _ in range(2):
                assert triton_impl.weight_gradient(*columns, 130, torch.float32, place) is None
        assert products.seen == [asked] * 2
        assert_near(place.sum, 2 * wanted, EXACT, "sum")


@pytest.mark.parametrize("activation", ["swiglu", pytest.param("squared_relu", marks=pytest.mark.slow)])
def test_a_ranks_only_expert_equals_our_kernels(activation, poisoned_memory):
    leaves = only_leaves(63, torch.float32, activation=activation, model=128, hidden=128)
    for leaf in leaves[2:]:
        leaf.recipe = Recipe("fp8_block")
    wanted = [each.clone() for each in run_only(leaves, activation=activation, backend="triton")]
    grouped = run_only(leaves, activation=activation, backend="triton", grouped=True)
    assert_all_near(grouped, wanted, EXACT, ONLY_NAMES)
    with product_backend("torch"), ScaledProducts() as products:
        found = run_only(leaves, activation=activation, backend="triton")
    # All but up, which makes the activation's codes.
    assert products.seen == ["_scaled_mm_v2"] * 5
    assert_all_near(found, wanted, EXACT, ONLY_NAMES)


def test_only_hopper_has_them_and_a_choice_of_them_elsewhere_is_an_error(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    assert not takes_codes(device) and not multiplies_by_library(device, 256)
    with (
        product_backend("torch"),
        pytest.raises(ValueError, match="needs compute capability 9 and torch 2"),
    ):
        multiplies_by_library(device, 256)
    with product_backend("triton"):
        assert not multiplies_by_library(device, 256)
