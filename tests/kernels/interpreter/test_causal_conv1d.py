"""The Triton convolution in the interpreter against the step-by-step definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from amfm.kernels.causal_conv1d import triton_impl
from amfm.kernels.causal_conv1d.op import causal_conv1d
from tests.helpers.numbers import assert_all_near, assert_bitwise, assert_near
from tests.helpers.registration import assert_registered
from tests.kernels.twice import Twice

FLOAT32 = 1e-5  # rounding of a handful of additions; the weights' gradients sum a few hundred


def make(B: int, T: int, C: int, W: int, *, window: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, C), (C, W), (C,)] + ([(B, W - 1, C)] if window else [])
    return [torch.randn(*s, generator=generator).requires_grad_() for s in shapes]


def documents(T: int, *starts: int) -> Tensor:
    ids = torch.zeros(2, T, dtype=torch.int32)
    for start in starts:
        ids[0, start:] += 1
    return ids


def run(tensors: list[Tensor], ids: Tensor | None, backend: str, activation: str = "silu") -> list[Tensor]:
    x, weight, bias, *window = tensors
    initial = window[0] if window else None
    y = causal_conv1d(
        x, weight, bias, document_ids_BT=ids, initial_window_BWC=initial, activation=activation, backend=backend
    )
    dy = torch.linspace(-1, 2, y.numel()).view(y.shape)
    return [y, *torch.autograd.grad((y * dy).sum(), tensors)]


@pytest.mark.parametrize(
    ("T", "C", "W", "window", "starts", "activation"),
    [
        (1, 5, 4, False, None, "silu"),
        (37, 40, 4, False, (1, 2, 30), "silu"),
        pytest.param(40, 33, 3, True, (10,), "silu", marks=pytest.mark.slow),
        (40, 33, 3, True, (10,), "none"),
        (20, 8, 2, False, None, "silu"),
        (35, 5, 4, True, (1, 18), "silu"),
        (1, 5, 4, True, None, "silu"),
    ],
)
def test_tiles_equal_single_steps_twice_bitwise(
    T: int,
    C: int,
    W: int,
    window: bool,
    starts: tuple[int, ...] | None,
    activation: str,
    twice: Twice,
    poisoned_memory: None,
) -> None:
    tensors = make(2, T, C, W, window=window)
    ids = None if starts is None else documents(T, *starts)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    once = twice(lambda: run(tensors, ids, "triton", activation))
    assert_all_near(once, run(exact, ids, "reference", activation), FLOAT32)


def test_a_document_never_feels_another() -> None:
    tensors = make(2, 40, 6, 4, window=False)
    ids = documents(40, 10, 25)
    before = run(tensors, ids, "triton")
    with torch.no_grad():
        tensors[0][0, 10:25] = 5.0
    after = run(tensors, ids, "triton")
    for name, new, old in zip(("y", "dx"), after, before):
        assert_bitwise(new[0, :10], old[0, :10], name)
        assert_bitwise(new[0, 25:], old[0, 25:], name)
        assert_bitwise(new[1], old[1], name)


def test_slices_of_a_wider_projection_are_read_where_they_lie() -> None:
    wide = torch.randn(2, 20, 30)
    weight = torch.randn(10, 4)
    y = causal_conv1d(wide[..., 10:20], weight, None, backend="triton")
    assert_near(y, causal_conv1d(wide[..., 10:20].contiguous(), weight, None), FLOAT32)


def test_meta_tensors_pass_through() -> None:
    x, weight = torch.empty(2, 9, 6, device="meta"), torch.empty(6, 4, device="meta")
    assert causal_conv1d(x, weight, None, backend="triton").shape == (2, 9, 6)


def test_registration_is_complete() -> None:
    x, weight, bias, window = make(2, 5, 4, 4, window=True)
    for before in (None, window):
        assert_registered(triton_impl._forward, x, weight, bias, None, before, True)
