"""kernels/linear: equality with float64 products, gradients too, in every dtype."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from amfm.kernels.common import gemm_precision
from amfm.kernels.common.weight_gradients import Later, compute_now, gradients_by_autograd, split_backward
from amfm.kernels.linear.op import _Float32Linear, linear, linear_float32, split_in_halves
from tests.helpers.gradient_place import Place

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


@pytest.mark.parametrize("operation", [linear, linear_float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_weight_gradient_lands_in_its_sum_unrounded_and_autograd_gets_none(operation, dtype, recomputed, monkeypatch):
    # Elsewhere a CPU's own products of bfloat16 are rounded.
    monkeypatch.setattr(gemm_precision, "_MULTIPLIES_BF16", False)
    torch.manual_seed(0)
    x = torch.randn(2, 63, 24).to(dtype).requires_grad_()
    weight = torch.randn(40, 24).to(dtype).requires_grad_()
    grads = torch.randn(3, 2, 63, 40).to(torch.float32 if operation is linear_float32 else dtype)
    operation(x, weight).backward(grads[0])
    (wanted_x, wanted), x.grad, weight.grad = (x.grad, weight.grad), None, None
    place = Place.of(weight)
    fired: list[torch.Tensor | None] = []
    weight.register_post_accumulate_grad_hook(lambda weight: fired.append(weight.grad))
    for grad in grads:
        # What a recomputed block saves are copies of its parameters.
        y = checkpoint(operation, x, weight, use_reentrant=False) if recomputed else operation(x, weight)
        y.backward(grad)
        if place.passes == 1:
            assert torch.equal(x.grad, wanted_x) and torch.equal(place.sum.to(dtype), wanted)
    assert fired == [None] * 3 and place.passes == 3, "autograd comes to the weight once per pass, without a gradient"
    exact = torch.einsum("pbto,bti->oi", grads.double(), x.detach().double())
    assert (place.sum - exact).norm() <= 1e-6 * exact.norm(), "float32: sums of 378 products"
    with gradients_by_autograd():
        y = operation(x, weight)
    y.backward(grads[0])
    assert torch.equal(weight.grad, wanted) and place.passes == 3


def test_a_weight_gradient_that_is_computed_later_lands_in_its_sum():
    torch.manual_seed(0)
    x, weight, grad = torch.randn(63, 24), torch.randn(40, 24).requires_grad_(), torch.randn(63, 40)
    place = Place.of(weight)
    later: Later = []
    with split_backward(later):
        (linear(x, weight) + linear(x, weight)).backward(grad)
    assert place.passes == 0
    collected: list[torch.Tensor] = []
    compute_now(later, collected.append)
    assert torch.equal(place.sum, 2 * (grad.T @ x)) and weight.grad is None
    assert [one is weight for one in collected] == [True]


class ProductWatch(TorchDispatchMode):
    """Notes the dtypes of every product's operands and result."""

    def __init__(self):
        super().__init__()
        self.dtypes, self.names = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function._opname in ("mm", "addmm"):
            left, right = args[-3:-1] if "dtype" in function._overloadname else args[-2:]
            self.names.append(function._opname)
            self.dtypes.append((left.dtype, right.dtype, result.dtype))
        return result


@pytest.mark.parametrize("device", ["cuda", "meta"])
@pytest.mark.parametrize("accumulates", [False, True])
def test_float32_products_of_bfloat16_run_on_tensor_cores_in_both_passes_on_cuda(accumulates, device):
    """On fake tensors, and on the meta device, which plans pass blocks on: which products a GPU would take. One forward, two
    backward, of which that of the input is rounded once; each half of a gradient that accumulates.
    """
    with FakeTensorMode(), ProductWatch() as watch:
        x, weight, grad = (
            torch.empty(shape, dtype=dtype, device=device)
            for shape, dtype in (
                ((2, 21, 64), torch.bfloat16),
                ((40, 64), torch.bfloat16),
                ((2, 21, 40), torch.float32),
            )
        )
        total = Place(torch.empty(40, 64, device=device)) if accumulates else None
        y = _Float32Linear.forward(SimpleNamespace(save_for_backward=lambda *_: None), x, weight, total)
        grads = _Float32Linear.backward(SimpleNamespace(saved_tensors=(x, weight), total=total), grad)
    assert (y.dtype, y.shape) == (torch.float32, grad.shape)
    assert (grads[0].dtype, grads[0].shape) == (torch.bfloat16, x.shape)
    assert grads[1] is None if accumulates else (grads[1].dtype, grads[1].shape) == (torch.bfloat16, weight.shape)
    assert watch.names == ["mm", "mm", *(["mm", "addmm"] if accumulates else ["mm"])]
    results = [torch.bfloat16 if number == 1 else torch.float32 for number in range(len(watch.names))]
    assert watch.dtypes == [(torch.bfloat16, torch.bfloat16, result) for result in results]


def test_halves_of_a_gradient_give_its_products_beyond_the_digits_of_bfloat16():
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(200, 40, generator=generator) * torch.logspace(-30, 3, 40)
    other = torch.randn(40, 30, generator=generator).bfloat16()
    halves = split_in_halves(grad)
    assert (halves.dtype, halves.shape) == (torch.bfloat16, (200, 80))
    high, low = halves.double().chunk(2, 1)
    assert (high + low - grad.double()).abs().le(2**-17 * grad.double().abs()).all()
    exact = grad.double() @ other.double()
    assert (halves.double() @ other.double().repeat(2, 1) - exact).norm() <= 2**-16 * exact.norm()
