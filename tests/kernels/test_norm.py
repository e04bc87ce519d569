"""The norms against their definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from amfm.kernels.norm.layer_norm import layer_norm
from amfm.kernels.norm.op import gated_rms_norm, head_norm, rms_norm
from tests.helpers.numbers import assert_all_near, assert_near

FLOAT64 = 1e-13  # means over at most some hundred values, in another order
FLOAT32 = 1e-5  # what is along the normed row is taken away: a difference of larger numbers
BFLOAT16 = 1e-2  # inputs and outputs carry 2^-9 each


def make(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def with_gradients(output: Tensor | tuple[Tensor, Tensor], tensors: list[Tensor]) -> list[Tensor]:
    outputs = output if isinstance(output, tuple) else (output,)
    total = sum(
        (o.double() * torch.linspace(-1, 2, o.numel(), dtype=torch.float64).view(o.shape)).sum() for o in outputs
    )
    assert isinstance(total, Tensor)
    return [*outputs, *torch.autograd.grad(total, tensors)]


@pytest.mark.parametrize("shape", [(1, 3), (63, 5), (2, 3, 129), (4200, 129)])
@pytest.mark.parametrize("residual", [False, True])
def test_norm_equals_its_definition(
    shape: tuple[int, ...], residual: bool, poisoned_memory: None, one_thread: None
) -> None:
    x, r, weight = make(torch.float64, shape, shape, shape[-1:])
    leaves = [x, weight, r] if residual else [x, weight]
    results = [
        with_gradients(rms_norm(x, weight, 1e-5, residual=r if residual else None, backend=backend), leaves)
        for backend in ("torch", "reference")
    ]
    assert_all_near(*results, FLOAT64)


@pytest.mark.parametrize(
    ("shape", "groups"), [((1, 4), 1), ((63, 24), 8), ((2, 5, 12), 3), ((100, 129), 1), ((4200, 129), 3)]
)
def test_gated_norm_equals_its_definition(
    shape: tuple[int, ...], groups: int, poisoned_memory: None, one_thread: None
) -> None:
    y, z, weight = make(torch.float64, shape, shape, shape[-1:])
    results = [
        with_gradients(gated_rms_norm(y, z, weight, 1e-5, num_groups=groups, backend=backend), [y, z, weight])
        for backend in ("torch", "reference")
    ]
    assert_all_near(*results, FLOAT64)


@pytest.mark.parametrize("shape", [(1, 3), (63, 5), (2, 3, 129)])
@pytest.mark.parametrize("residual", [False, True])
def test_layer_norm_equals_its_definition(shape: tuple[int, ...], residual: bool, poisoned_memory: None) -> None:
    x, r, weight, bias = make(torch.float64, shape, shape, shape[-1:], shape[-1:])
    leaves = [x, weight, bias, r] if residual else [x, weight, bias]
    results = [
        with_gradients(layer_norm(x, weight, bias, 1e-5, residual=r if residual else None, backend=backend), leaves)
        for backend in ("torch", "reference")
    ]
    assert_all_near(*results, FLOAT64)


def test_layer_norm_takes_narrow_values_with_wide_weights() -> None:
    x, weight, bias = make(torch.bfloat16, (40, 32), (32,), (32,))
    exact = layer_norm(x.double(), weight.double(), bias.double(), 1e-5)
    for weights in ((weight, bias), (weight.float(), bias.float())):
        y = layer_norm(x, *weights, 1e-5)
        assert y.dtype == torch.bfloat16
        assert_near(y, exact, BFLOAT16)


def test_gradients_match_finite_differences() -> None:
    y, z, weight = make(torch.float64, (3, 6), (3, 6), (6,))
    assert torch.autograd.gradcheck(lambda *t: gated_rms_norm(*t, 1e-5, num_groups=2), (y, z, weight))
    assert torch.autograd.gradcheck(lambda a, b, w: rms_norm(a, w, 1e-5, residual=b), (y, z, weight))


@pytest.mark.parametrize("rows", [40, 18000])  # the latter in three blocks, the last one shorter
def test_bfloat16_stays_near_float64(rows: int, poisoned_memory: None, one_thread: None) -> None:
    tensors = make(torch.bfloat16, (rows, 32), (rows, 32), (32,))
    exact = [t.detach().double().requires_grad_() for t in tensors]
    results = [with_gradients(gated_rms_norm(*t, 1e-5, num_groups=2), t) for t in (tensors, exact)]
    assert_all_near(*results, BFLOAT16)
    x, _, weight = tensors
    results = [with_gradients(rms_norm(a, w, 1e-5), [a, w]) for a, w in ((x, weight), (exact[0], exact[2]))]
    assert_all_near(*results, BFLOAT16)


def test_no_rows_give_none_and_a_zero_gradient() -> None:
    y, z, weight = make(torch.bfloat16, (0, 8), (0, 8), (8,))
    for output in (gated_rms_norm(y, z, weight, 1e-5, num_groups=2), rms_norm(y, weight, 1e-5)):
        assert output.shape == (0, 8)
        assert torch.equal(torch.autograd.grad(output.sum(), weight)[0], torch.zeros_like(weight))


def test_rows_do_not_touch_each_other() -> None:
    y, z, weight = make(torch.float32, (200, 16), (200, 16), (16,))
    whole = gated_rms_norm(y, z, weight, 1e-5)
    assert torch.equal(gated_rms_norm(y[150:], z[150:], weight, 1e-5), whole[150:])


def test_gates_far_from_zero_open_or_close_wholly() -> None:
    y, z, weight = make(torch.float32, (6, 8), (6, 8), (8,))
    with torch.no_grad():
        z[:, :6] = torch.tensor([-1e4, -200.0, -30.0, 30.0, 200.0, 1e4])
    exact = [t.detach().double().requires_grad_() for t in (y, z, weight)]
    expected = with_gradients(gated_rms_norm(*exact, 1e-5, backend="reference"), exact)
    assert_all_near(with_gradients(gated_rms_norm(y, z, weight, 1e-5), [y, z, weight]), expected, FLOAT32)


def test_zero_rows_give_zero_not_nan() -> None:
    x = torch.zeros(3, 8, requires_grad=True)
    weight = torch.ones(8, requires_grad=True)
    for value in with_gradients(rms_norm(x, weight, 1e-5), [x, weight]):
        assert bool(torch.isfinite(value).all())


def test_strided_rows_are_read_where_they_lie() -> None:
    wide, weight = make(torch.float64, (5, 24), (8,))
    assert_near(rms_norm(wide[:, 8:16], weight, 1e-5), rms_norm(wide[:, 8:16].contiguous(), weight, 1e-5), FLOAT64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 8), torch.zeros(3, 7), torch.zeros(8)), r"z must have shape \[3, 8\]; got \[3, 7\]"),
        ((torch.zeros(3, 8), torch.zeros(3, 8), torch.zeros(7)), r"weight must have shape \[8\]; got \[7\]"),
        ((torch.zeros(3, 8), torch.zeros(3, 8).double(), torch.zeros(8)), "z must be torch.float32"),
    ],
)
def test_wrong_inputs_are_named(arguments: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(*arguments, 1e-5)


def test_groups_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="num_groups must divide the last dim of y, 8; got 3"):
        gated_rms_norm(torch.zeros(3, 8), torch.zeros(3, 8), torch.zeros(8), 1e-5, num_groups=3)


def test_norm_of_heads_is_the_norm_times_the_activated_gate() -> None:
    o, gate, weight = make(torch.float64, (2, 3, 2, 5), (2, 3, 10), (5,))
    normed = rms_norm(o, weight, 1e-5, backend="reference").flatten(-2)
    assert_all_near([head_norm(o, gate, weight, 1e-5, backend="torch")], [normed * gate * gate.sigmoid()], FLOAT64)
    found = head_norm(o, gate, weight, 1e-5, act="sigmoid", backend="torch")
    assert_all_near([found, head_norm(o, None, weight, 1e-5)], [normed * gate.sigmoid(), normed], FLOAT64)
    with pytest.raises(ValueError, match=r"gate_BTI must have shape \[2, 3, 10\]"):
        head_norm(o, gate[..., 1:], weight, 1e-5)
