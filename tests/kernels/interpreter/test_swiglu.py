"""The Triton activations in the interpreter against their formulas."""

import pytest
import torch

from amfm.kernels.swiglu import triton_impl
from amfm.kernels.swiglu.op import squared_relu, swiglu
from tests.helpers.numbers import assert_all_near, assert_near
from tests.helpers.registration import assert_registered
from tests.kernels.test_swiglu import geglu, geglu_erf, gelu, gelu_tanh, limited, limited_silu

FLOAT32 = 1e-6  # one rounding an operation, a handful of operations
BFLOAT16 = 1e-2  # inputs are exact; the interpreter cuts the result's last bits off


def run(activation, x, backend):
    leaf = x.clone().requires_grad_()
    y = activation(leaf, backend=backend)
    (grad,) = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum(), leaf)
    return [y, grad]


@pytest.mark.parametrize("shape", [(1, 2), (63, 10), (2, 3, 150)])
@pytest.mark.parametrize("activation", [swiglu, limited, limited_silu, geglu, geglu_erf, gelu, gelu_tanh, squared_relu])
def test_kernels_equal_the_formulas_twice_bitwise(activation, shape, twice, poisoned_memory):
    torch.manual_seed(0)
    x = torch.randn(shape) * 3
    once = twice(lambda: run(activation, x, "triton"))
    assert_all_near(once, run(activation, x.double(), "reference"), FLOAT32)


@pytest.mark.parametrize("activation", [swiglu, squared_relu, gelu])
def test_bfloat16_is_computed_in_float32(activation):
    x = torch.randn(5, 12).bfloat16()
    assert_near(activation(x, backend="triton"), activation(x.double()), BFLOAT16)


def test_float64_is_refused_and_meta_tensors_pass_through():
    with pytest.raises(ValueError, match="float64"):
        swiglu(torch.randn(2, 4).double(), backend="triton")
    assert swiglu(torch.empty(3, 8, device="meta"), backend="triton").shape == (3, 4)
    assert squared_relu(torch.empty(3, 8, device="meta"), backend="triton").shape == (3, 8)


@pytest.mark.parametrize(
    ("operation", "others"), [(triton_impl._swiglu, (1.702, 1.0, 7.0, 0.04)), (triton_impl._plain, (0.0,))]
)
def test_registration_is_complete(operation, others):
    assert_registered(operation, torch.randn(3, 4, requires_grad=True), *others)
