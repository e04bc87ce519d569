"""The Triton norms in the interpreter against their definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from amfm.kernels.norm import triton_impl
from amfm.kernels.norm.layer_norm import layer_norm
from amfm.kernels.norm.op import gated_rms_norm, head_norm, rms_norm
from tests.helpers.numbers import assert_all_near, assert_near
from tests.helpers.registration import assert_registered
from tests.kernels.twice import Twice

FLOAT32 = 1e-5  # means over some hundred values


def make(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*s, generator=generator).requires_grad_() for s in shapes]


def with_gradients(output: Tensor | tuple[Tensor, Tensor], tensors: list[Tensor]) -> list[Tensor]:
    outputs = output if isinstance(output, tuple) else (output,)
    total = sum((o * torch.linspace(-1, 2, o.numel()).view(o.shape)).sum() for o in outputs)
    assert isinstance(total, Tensor)
    return [*outputs, *torch.autograd.grad(total, tensors)]


@pytest.mark.parametrize("shape", [(1, 3), (63, 20), (2, 3, 129)])
@pytest.mark.parametrize("residual", [False, True])
def test_norm_equals_its_definition_twice_bitwise(
    shape: tuple[int, ...], residual: bool, twice: Twice, poisoned_memory: None
) -> None:
    tensors = make(shape, shape[-1:], *([shape] if residual else []))
    exact = [t.detach().double().requires_grad_() for t in tensors]

    def run(t: list[Tensor], backend: str) -> list[Tensor]:
        extra = t[2] if residual else None
        return with_gradients(rms_norm(t[0], t[1], 1e-5, residual=extra, backend=backend), t)

    once = twice(lambda: run(tensors, "triton"))
    assert_all_near(once, run(exact, "reference"), FLOAT32)


@pytest.mark.parametrize("shape", [(1, 3), (2, 33, 129)])
@pytest.mark.parametrize("residual", [False, True])
def test_layer_norm_equals_its_definition_twice_bitwise(
    shape: tuple[int, ...], residual: bool, twice: Twice, poisoned_memory: None
) -> None:
    tensors = make(shape, shape[-1:], shape[-1:], *([shape] if residual else []))
    exact = [t.detach().double().requires_grad_() for t in tensors]

    def run(t: list[Tensor], backend: str) -> list[Tensor]:
        return with_gradients(layer_norm(*t[:3], 1e-5, residual=t[3] if residual else None, backend=backend), t)

    once = twice(lambda: run(tensors, "triton"))
    assert_all_near(once, run(exact, "reference"), FLOAT32)


@pytest.mark.parametrize(("shape", "groups"), [((1, 4), 1), ((63, 24), 8), ((2, 5, 12), 3), ((10, 129), 1)])
def test_gated_norm_equals_its_definition_twice_bitwise(
    shape: tuple[int, ...], groups: int, twice: Twice, poisoned_memory: None
) -> None:
    tensors = make(shape, shape, shape[-1:])
    exact = [t.detach().double().requires_grad_() for t in tensors]

    def run(t: list[Tensor], backend: str) -> list[Tensor]:
        return with_gradients(gated_rms_norm(*t, 1e-5, num_groups=groups, backend=backend), t)

    once = twice(lambda: run(tensors, "triton"))
    assert_all_near(once, run(exact, "reference"), FLOAT32)


@pytest.mark.parametrize(("shape", "act"), [((1, 1, 1, 3), "silu"), ((2, 11, 3, 20), "sigmoid"), ((1, 9, 2, 16), "")])
def test_norm_of_heads_with_a_gate_equals_its_definition_twice_bitwise(
    shape: tuple[int, ...], act: str, twice: Twice, poisoned_memory: None
) -> None:
    gates = [(*shape[:2], shape[2] * shape[3] + 4)] if act else []
    tensors = make(shape, shape[-1:], *gates)
    exact = [t.detach().double().requires_grad_() for t in tensors]

    def run(t: list[Tensor], backend: str) -> list[Tensor]:
        gate = t[2][..., 4:] if act else None  # a slice of a projection
        return with_gradients(head_norm(t[0], gate, t[1], 1e-5, act=act or "silu", backend=backend), t)  # type: ignore[arg-type]

    assert_all_near(twice(lambda: run(tensors, "triton")), run(exact, "reference"), FLOAT32)


def test_slices_of_a_wider_projection_are_read_where_they_lie() -> None:
    wide, weight = make((2, 5, 24), (8,))
    y = gated_rms_norm(wide[..., :8], wide[..., 16:], weight, 1e-5, backend="triton")
    assert_near(y, gated_rms_norm(wide[..., :8], wide[..., 16:], weight, 1e-5), FLOAT32)


def test_meta_tensors_pass_through() -> None:
    x, weight = torch.empty(2, 9, 6, device="meta"), torch.empty(6, device="meta")
    y, h = rms_norm(x, weight, 1e-5, residual=x, backend="triton")
    assert y.shape == h.shape == (2, 9, 6)


def test_registration_is_complete() -> None:
    x, r, weight = make((3, 8), (3, 8), (8,))
    assert_registered(triton_impl._norm, x, r, weight, 1e-5, 1, False)
    assert_registered(triton_impl._norm, x, r, weight, 1e-5, 2, True)


def test_groups_too_wide_for_one_program_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of up to 32768 values; got 40000"):
        rms_norm(torch.zeros(1, 40000), torch.ones(40000), 1e-5, backend="triton")
