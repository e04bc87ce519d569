"""What torch's scaled products are given on a GPU: codes, scales and sizes as they ask for them, seen with fake tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from amfm.kernels.low_precision.recipe import Recipe
from tests.helpers.gradient_place import Place

pytest.importorskip("triton")
RUN = {"mxfp8": 32, "nvfp4": 16}


class Products(TorchDispatchMode):
    """Notes the products that torch is asked for, with their operands and scales."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled" in func._opname and func.namespace == "aten":
            self.seen.append((func._opname, args))
        return func(*args, **(kwargs or {}))


def check_operand(codes, scales, name):
    """Sizes and dtypes that cuBLASLt takes: runs along a contiguous sum, scales in whole pieces of 128 rows and four runs."""
    rows, inner = codes.shape
    inner *= 2 if name == "nvfp4" else 1
    assert codes.dtype == {"mxfp8": torch.float8_e4m3fn, "nvfp4": torch.float4_e2m1fn_x2}[name]
    assert codes.stride() == (codes.shape[1], 1) and codes.shape[1] % 16 == 0
    assert scales[0].dtype == {"mxfp8": torch.float8_e8m0fnu, "nvfp4": torch.float8_e4m3fn}[name]
    assert scales[0].is_contiguous() and scales[0].numel() == -(-rows // 128) * 128 * -(-inner // RUN[name] // 4) * 4
    assert [each.numel() for each in scales[1:]] == ([1] if name == "nvfp4" else [])
    assert all(each.dtype == torch.float32 for each in scales[1:])


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_projections_are_torchs_scaled_products_and_land_in_sums(name):
    from amfm.kernels.low_precision.scaled_impl import BlockScaled

    by, rows, inputs, outputs = BlockScaled(Recipe(name)), 200, 96, 160
    with FakeTensorMode(), Products() as products:
        x, dy, weight = (torch.empty(*shape, device="cuda", dtype=torch.bfloat16)
                         for shape in ((rows, inputs), (rows, outputs), (outputs, inputs)))  # fmt: skip
        x_rows, x_columns = by.quantize_rows(x, rows=True, columns=True)
        dy_rows, dy_columns = by.quantize_rows(dy, rows=True, columns=True, gradient=True)
        y = by.product(x_rows, by.quantize_weight(weight), torch.bfloat16)
        dx = by.product(dy_rows, by.quantize_weight(weight, transposed=True), torch.bfloat16)
        dw = by.weight_gradient(dy_columns, x_columns, rows, torch.bfloat16, None)
        place = Place.of(weight)
        assert by.weight_gradient(dy_columns, x_columns, rows, torch.bfloat16, place) is None
    assert y.shape == dy.shape and dx.shape == x.shape and dw.shape == weight.shape
    assert [opname for opname, _ in products.seen] == ["_scaled_mm_v2"] * 3 + ["_scaled_addmm_"]
    for opname, given in products.seen:
        left, right, scales, kinds, orders, right_scales, *_ = given[1:] if "addmm" in opname else given
        check_operand(left, scales, name)
        check_operand(right.t(), right_scales, name)
        assert left.shape[1] == right.shape[0] and len(kinds) == len(orders) == len(scales)
