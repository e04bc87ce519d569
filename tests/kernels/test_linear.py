"""kernels/linear: equality with float64 products, gradients too, in every dtype."""

import pytest
import torch

from kernels.linear.op import linear, linear_float32
from kernels.split_backward import Later, compute_now, split_backward

# float32: sums of 63 products; bfloat16: one rounding of inputs' products, 8 bits of mantissa.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(1, 1), (2, 63)])
def test_linear_equals_float64_products_with_gradients(dtype: torch.dtype, rows: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(*rows, 63).to(dtype).requires_grad_()
    weight = torch.randn(40, 63).to(dtype).requires_grad_()
    grad = torch.randn(*rows, 40).to(dtype)
    y = linear(x, weight)
    y.backward(grad)
    assert y.dtype == dtype
    x64, w64, g64 = x.detach().double(), weight.detach().double(), grad.double()
    expected = {
        "y": (y.detach(), x64 @ w64.T),
        "x": (x.grad, g64 @ w64),
        "weight": (weight.grad, torch.einsum("bto,bti->oi", g64, x64)),
    }
    for name, (ours, reference) in expected.items():
        assert ours is not None, name
        error = (ours.double() - reference).norm() / reference.norm()
        assert error <= TOLERANCE[dtype], f"{name}: {error}"


def test_float32_products_of_bfloat16_are_not_rounded_and_keep_no_wide_copy() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 21, 63).bfloat16().requires_grad_()
    weight = torch.randn(40, 63).bfloat16().requires_grad_()
    grad = torch.randn(2, 21, 40)
    saved: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = linear_float32(x, weight)
    y.backward(grad)
    assert {tensor.dtype for tensor in saved} == {torch.bfloat16}
    x64, w64, g64 = x.detach().double(), weight.detach().double(), grad.double()
    for ours, exact, dtype in (
        (y.detach(), x64 @ w64.T, torch.float32),
        (x.grad, g64 @ w64, torch.bfloat16),
        (weight.grad, torch.einsum("bto,bti->oi", g64, x64), torch.bfloat16),
    ):
        assert ours is not None and ours.dtype == dtype
        assert (ours.double() - exact).norm() <= TOLERANCE[dtype] * exact.norm()
    wide = x.detach().double().requires_grad_()
    assert torch.equal(linear_float32(wide, weight.detach()), x64 @ w64.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_gradient_that_is_computed_later_is_the_same_to_the_bit_and_adds_to_what_is_there(dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 63, 24).to(dtype).requires_grad_()
    weight, frozen = torch.randn(40, 24).to(dtype).requires_grad_(), torch.randn(40, 24).to(dtype)
    grad = torch.randn(2, 63, 40).to(dtype)
    linear(x, weight).backward(grad)
    assert x.grad is not None and weight.grad is not None
    wanted_x, wanted, x.grad, weight.grad = x.grad, weight.grad, None, None
    later: Later = []
    with split_backward(later):
        linear(x, weight).backward(grad)
        assert weight.grad is None and torch.equal(x.grad, wanted_x)
        linear(x, frozen).backward(grad)
    assert len(later) == 1, "a frozen weight has no gradient"
    collected: list[torch.Tensor] = []
    twice = [*later, *later]
    compute_now(later, collected.append)
    assert later == [] and torch.equal(weight.grad, wanted)
    compute_now(twice, collected.append)
    assert torch.equal(weight.grad, wanted + wanted + wanted)
    assert [one is weight for one in collected] == [True, True], "once a pass, however often it multiplied"
