"""Activations against their formulas."""

import pytest
import torch

from amfm.kernels.swiglu.op import squared_relu, swiglu

# One rounding an operation, a handful of operations.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6}


@pytest.mark.parametrize("shape", [(1, 2), (63, 10), (2, 3, 34)])
@pytest.mark.parametrize("activation", [swiglu, squared_relu])
def test_torch_path_equals_the_formula_in_output_and_gradient(activation, shape):
    for dtype, tolerance in TOLERANCE.items():
        torch.manual_seed(0)
        x = torch.randn(shape, dtype=torch.float64) * 3
        results = []
        for backend, precision in (("reference", torch.float64), ("torch", dtype)):
            leaf = x.to(dtype).to(precision).requires_grad_()
            y = activation(leaf, backend=backend)
            (grad,) = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum(), leaf)
            results.append((y.detach(), grad))
        for wanted, got in zip(*results):
            assert (got - wanted).norm() <= tolerance * wanted.norm() + 1e-30


@pytest.mark.parametrize("activation", [swiglu, squared_relu])
def test_gradients_pass_gradcheck(activation):
    torch.manual_seed(1)
    assert torch.autograd.gradcheck(activation, torch.randn(5, 6, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("activation", [swiglu, squared_relu])
def test_bfloat16_rounds_once(activation):
    torch.manual_seed(2)
    x = torch.randn(40, 32).bfloat16()
    assert torch.equal(activation(x), activation(x.float()).bfloat16())


def test_large_inputs_stay_finite():
    x = torch.tensor([[-200.0, 1.0], [200.0, 1.0]], requires_grad=True)
    swiglu(x).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("activation", [swiglu, squared_relu])
def test_compiled_result_is_the_eager_one(activation):
    x = torch.randn(4, 8)
    compiled = torch.compile(activation, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), activation(x))


def test_bad_input_is_refused_with_what_was_expected():
    with pytest.raises(ValueError, match="even last dim"):
        swiglu(torch.randn(2, 3))
    with pytest.raises(ValueError, match="floating point"):
        squared_relu(torch.ones(2, 2, dtype=torch.int64))
