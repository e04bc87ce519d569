"""Rounding as on a GPU, emulated: what it rounds, and that kernels in bfloat16 stay near the float64 definition with
it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from amfm.kernels.attention.op import attention
from amfm.kernels.decay_scan.op import decay_scan, mamba2_scan
from amfm.kernels.delta_scan.op import delta_scan
from amfm.kernels.linear_cross_entropy.op import linear_cross_entropy
from amfm.kernels.moe.op import expert_feed_forward
from amfm.kernels.proof.check import emulate_rounding
from tests.helpers.numbers import assert_bitwise, assert_near

# Operands, outputs and states carry 2^-9 each, and a path through a kernel rounds up to ten times. Outputs and gradients
# of tokens are within 1e-2; a gradient that sums over all tokens, such as that of A_log, may cancel.
BFLOAT16 = 2e-2

T, H, K = 70, 2, 32
DOCUMENTS = torch.tensor([[0] * 30 + [1] * 40], dtype=torch.int32)


def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


def gate(*shape: int) -> Tensor:
    return -torch.rand(*shape)


def mamba2() -> tuple[list[Tensor], Callable[..., Tensor]]:
    leaves = [draw(1, T, H, K), draw(1, T, H), draw(H, dtype=torch.float32), draw(1, T, 1, K, scale=K**-0.5)]
    leaves += [draw(1, T, 1, K), draw(H, dtype=torch.float32), draw(H, dtype=torch.float32)]
    return leaves, lambda *x, backend: mamba2_scan(*x, document_ids_BT=DOCUMENTS, backend=backend).y_BTHP


def decay() -> tuple[list[Tensor], Callable[..., Tensor]]:
    leaves = [draw(1, T, H, K), draw(1, T, H, K, scale=K**-0.5), draw(1, T, H, K), gate(1, T, H)]
    return leaves, lambda *x, backend: decay_scan(*x, chunk_size=128, backend=backend).o_BTHV


def vector_decay() -> tuple[list[Tensor], Callable[..., Tensor]]:
    leaves = [draw(1, T, H, K), draw(1, T, H, K, scale=K**-0.5), draw(1, T, H, K), gate(1, T, H, K)]
    return leaves, lambda *x, backend: decay_scan(*x, document_ids_BT=DOCUMENTS, backend=backend).o_BTHV


def delta(steps: int) -> tuple[list[Tensor], Callable[..., Tensor]]:
    keys = F.normalize(torch.randn(1, T, steps, 1, K), dim=-1).bfloat16()
    leaves = [draw(1, T, 1, K), keys, draw(1, T, steps, H, K), 2 * torch.rand(1, T, steps, H), gate(1, T, H)]
    return leaves, lambda *x, backend: delta_scan(*x, document_ids_BT=DOCUMENTS, backend=backend).o_BTHV


def channel_delta() -> tuple[list[Tensor], Callable[..., Tensor]]:
    keys = F.normalize(torch.randn(1, T, 1, H, K), dim=-1).bfloat16()
    leaves = [draw(1, T, H, K), keys, draw(1, T, 1, H, K), 2 * torch.rand(1, T, 1, H), gate(1, T, H, K)]
    return leaves, lambda *x, backend: delta_scan(*x, document_ids_BT=DOCUMENTS, backend=backend).o_BTHV


def attend() -> tuple[list[Tensor], Callable[..., Tensor]]:
    leaves = [draw(1, T, H, K), draw(1, T, 1, K), draw(1, T, 1, K)]
    return leaves, lambda *x, backend: attention(*x, document_ids_BS=DOCUMENTS, backend=backend)


def experts() -> tuple[list[Tensor], Callable[..., Tensor]]:
    ids, weights = torch.randint(0, 4, (T, 2)), torch.rand(T, 2)
    leaves = [draw(T, K), draw(4, 2 * K, K, scale=K**-0.5), draw(4, K, K, scale=K**-0.5)]
    return leaves, lambda x, up, down, backend: expert_feed_forward(
        x, ids, weights, up, down, activation="swiglu", backend=backend
    )


def loss() -> tuple[list[Tensor], Callable[..., Tensor]]:
    labels = torch.randint(0, 150, (T,))
    leaves = [draw(T, K), draw(150, K, scale=K**-0.5)]
    return leaves, lambda hidden, weight, backend: linear_cross_entropy(hidden, weight, labels, backend=backend).total


def run(operation: Callable[..., Tensor], leaves: list[Tensor], backend: str) -> list[Tensor]:
    """The output and the gradients of its weighted sum."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    output = operation(*leaves, backend=backend)
    weight = torch.linspace(-1.0, 1.0, output.numel(), dtype=torch.float64).view(output.shape) if output.dim() else 1.0
    return [output, *torch.autograd.grad((output * weight).sum(), leaves)]


@pytest.mark.parametrize(
    "case",
    [
        mamba2,
        decay,
        vector_decay,
        lambda: delta(1),
        pytest.param(lambda: delta(2), marks=pytest.mark.slow),
        channel_delta,
        attend,
        experts,
        loss,
    ],
    ids=[
        "mamba2",
        "decay",
        "vector decay",
        "delta",
        "delta product",
        "delta of channels",
        "attention",
        "experts",
        "cross-entropy",
    ],
)
def test_kernels_in_bfloat16_stay_near_the_definition(
    case: Callable[[], tuple[list[Tensor], Callable[..., Tensor]]],
) -> None:
    torch.manual_seed(0)
    leaves, operation = case()
    expected = run(operation, [leaf.double() for leaf in leaves], "reference")
    with emulate_rounding():
        values = run(operation, leaves, "triton")
    for i, (value, exact) in enumerate(zip(values, expected, strict=True)):
        assert_near(value, exact, BFLOAT16, f"tensor {i}")


@triton.jit
def _product_kernel(x, y, z, DOT: tl.constexpr, PRECISION: tl.constexpr):
    lane = tl.arange(0, 16)
    place = lane[:, None] * 16 + lane[None, :]
    product = tl.dot(tl.load(x + place).to(DOT), tl.load(y + place).to(DOT), input_precision=PRECISION)
    tl.store(z + place, product.to(z.dtype.element_ty))


def multiply(x: Tensor, y: Tensor, dtype: torch.dtype, dot: tl.dtype, precision: str = "ieee") -> Tensor:
    z = torch.empty(16, 16, dtype=dtype)
    with emulate_rounding():
        _product_kernel[(1,)](x, y, z, DOT=dot, PRECISION=precision)
    return z


def test_casts_and_operands_round_as_pytorch_rounds() -> None:
    torch.manual_seed(0)
    x, one = torch.randn(16, 16), torch.eye(16)
    x[0, :3] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -0.0])
    assert_bitwise(multiply(x, one, torch.float32, tl.bfloat16), x.bfloat16().float(), "operand")
    assert_bitwise(multiply(x, one, torch.bfloat16, tl.float32), x.bfloat16(), "result")
    assert_bitwise(multiply(x, one, torch.float32, tl.float32), x, "float32")
    cut = (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
    assert_bitwise(multiply(x, one, torch.float32, tl.float32, "tf32"), cut, "tf32")
    exact = multiply(x, x.T.contiguous(), torch.float32, tl.bfloat16)
    assert_near(exact, x.bfloat16().float() @ x.T.bfloat16().float(), 1e-6, "product")


def test_emulation_ends_with_its_block() -> None:
    q, k, v = (draw(1, 16, 1, 16, dtype=torch.float32) for _ in range(3))
    g = gate(1, 16, 1)
    before = decay_scan(q, k, v, g, chunk_size=16, backend="triton").o_BTHV
    with pytest.raises(ValueError, match="stop"), emulate_rounding():
        raise ValueError("stop")
    assert_bitwise(decay_scan(q, k, v, g, chunk_size=16, backend="triton").o_BTHV, before)
