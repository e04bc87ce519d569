"""Operations at the size of Granite-4-H-Small on a card: ours, PyTorch's, and those of public packages found there.

A package that is not installed is left out. Its functions are called as its documentation says.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention.op import attention, attention_bytes, attention_flops
from kernels.causal_conv1d.op import causal_conv1d, convolution_bytes, convolution_flops
from kernels.decay_scan.op import decay_scan, mamba2_scan, scan_bytes, scan_flops, vector_scan_bytes
from kernels.delta_scan.op import delta_bytes, delta_flops, delta_scan
from kernels.diag_scan.op import diag_bytes, diag_flops, diag_scan
from kernels.linear_cross_entropy.op import cross_entropy_bytes, cross_entropy_flops, linear_cross_entropy
from kernels.moe.op import expert_feed_forward, feed_forward_bytes, feed_forward_flops
from kernels.norm.op import gated_rms_norm, norm_bytes, norm_flops, rms_norm
from kernels.swiglu.op import swiglu, swiglu_bytes, swiglu_flops

EPSILON = 1e-5
SIZE = 2

Compute = Callable[..., Tensor]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the cases; the defaults are those of Granite-4-H-Small on one row of 8,192 tokens."""

    tokens: int = 8192
    model: int = 4096
    heads: int = 128
    head_dim: int = 64
    state: int = 128
    experts: int = 72
    top_k: int = 10
    expert_width: int = 768
    attention_heads: int = 32
    kv_heads: int = 8
    attention_dim: int = 128
    vocabulary: int = 100352


@dataclass(frozen=True)
class CudaCase:
    """An operation: leaves, variants, and least (bytes, operations) forward and backward."""

    op: str
    shape: str
    leaves: tuple[Tensor, ...]
    variants: dict[str, Compute]
    forward: tuple[int, int]
    backward: tuple[int, int]


def build_cuda_case(op: str, device: torch.device, sizes: Sizes) -> CudaCase:
    """The case of one operation of `CUDA_OPERATIONS`, in bfloat16 on `device`."""
    torch.manual_seed(0)
    return CUDA_OPERATIONS[op](device, sizes)


def find(module: str) -> Any:
    """A module of a package that may not be installed: None where it is not."""
    top = module.partition(".")[0]
    return importlib.import_module(module) if importlib.util.find_spec(top) is not None else None


def _leaf(device: torch.device, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_()


def _ours(run: Callable[..., Tensor]) -> dict[str, Compute]:
    """Our two backends of `run(*leaves, backend=...)`."""
    return {
        "triton": lambda *leaves: run(*leaves, backend="triton"),
        "torch": lambda *leaves: run(*leaves, backend="torch"),
    }


def _mamba2(device: torch.device, sizes: Sizes) -> CudaCase:
    H, P, N, T = sizes.heads, sizes.head_dim, sizes.state, sizes.tokens
    x, dt = _leaf(device, 1, T, H, P), _leaf(device, 1, T, H)
    B, C = (_leaf(device, 1, T, 1, N, scale=0.3) for _ in range(2))
    A_log, D, bias = (_leaf(device, H, dtype=torch.float32) for _ in range(3))
    variants = _ours(lambda *leaves, backend: mamba2_scan(*leaves, backend=backend).y_BTHP)
    theirs = find("mamba_ssm.ops.triton.ssd_combined")
    if theirs is not None:

        def mamba_ssm(x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
            A = -A_log.exp()
            return theirs.mamba_chunk_scan_combined(x, dt, A, B, C, 256, D=D, dt_bias=bias, dt_softplus=True)

        variants["mamba_ssm"] = mamba_ssm
    shape = (1, T, H, 1, N, P)
    return CudaCase(
        "decay_scan",
        f"1x{T}, {H} heads x {P}, state {N}",
        (x, dt, A_log, B, C, D, bias),
        variants,
        (scan_bytes(*shape), scan_flops(*shape, chunk_size=64)),
        (scan_bytes(*shape, backward=True), scan_flops(*shape, chunk_size=64, backward=True)),
    )


def _linear_attention(device: torch.device, sizes: Sizes) -> CudaCase:
    H, K, T = sizes.attention_heads, sizes.attention_dim, sizes.tokens
    q, k, v = (_leaf(device, 1, T, H, K, scale=K**-0.5) for _ in range(3))
    g = (-torch.rand(1, T, H, device=device)).requires_grad_()
    variants = _ours(lambda *leaves, backend: decay_scan(*leaves, backend=backend).o_BTHV)
    theirs = find("fla.ops.simple_gla")
    if theirs is not None:
        variants["fla"] = lambda q, k, v, g: theirs.chunk_simple_gla(q, k, v, g=g, scale=1.0)[0]
    shape = (1, T, H, H, K, K)
    return CudaCase(
        "linear_attention",
        f"1x{T}, {H} heads x {K}",
        (q, k, v, g),
        variants,
        (scan_bytes(*shape), scan_flops(*shape, chunk_size=64)),
        (scan_bytes(*shape, backward=True), scan_flops(*shape, chunk_size=64, backward=True)),
    )


def _vector_scan(device: torch.device, sizes: Sizes) -> CudaCase:
    """Heads of HGRN2: a gate for each of as many key channels as a head of attention has."""
    H, K, T = sizes.attention_heads, sizes.attention_dim, sizes.tokens
    q, k, v = (_leaf(device, 1, T, H, K, scale=K**-0.5) for _ in range(3))
    g = (-torch.rand(1, T, H, K, device=device)).requires_grad_()
    variants = _ours(lambda *leaves, backend: decay_scan(*leaves, backend=backend).o_BTHV)
    theirs = find("fla.ops.gla")
    if theirs is not None:
        variants["fla"] = lambda q, k, v, g: theirs.chunk_gla(q, k, v, g, scale=1.0)[0]
    shape, products = (1, T, H, K, K), (1, T, H, H, K, K)
    return CudaCase(
        "decay_scan_vector",
        f"1x{T}, {H} heads, states of {K} x {K}",
        (q, k, v, g),
        variants,
        (vector_scan_bytes(*shape), scan_flops(*products, chunk_size=64)),
        (vector_scan_bytes(*shape, backward=True), scan_flops(*products, chunk_size=64, backward=True)),
    )


def _diagonal(device: torch.device, sizes: Sizes) -> CudaCase:
    """The first Mamba, with 16 state numbers a channel."""
    T, C, N = sizes.tokens, sizes.heads * sizes.head_dim, 16
    x, dt, B, C_out = (_leaf(device, 1, T, width) for width in (C, C, N, N))
    A_log, D, bias = (_leaf(device, *shape, dtype=torch.float32) for shape in ((C, N), (C,), (C,)))
    variants = _ours(lambda *leaves, backend: diag_scan(*leaves, backend=backend).y_BTC)
    theirs = find("mamba_ssm.ops.selective_scan_interface")
    if theirs is not None:

        def mamba_ssm(x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
            x, dt, B, C = (each.transpose(1, 2) for each in (x, dt, B, C))
            out = theirs.selective_scan_fn(x, dt, -A_log.exp(), B, C, D, delta_bias=bias, delta_softplus=True)
            return out.transpose(1, 2)

        variants["mamba_ssm"] = mamba_ssm
    return CudaCase(
        "diag_scan",
        f"1x{T}x{C}, {N} state numbers",
        (x, dt, A_log, B, C_out, D, bias),
        variants,
        (diag_bytes(1, T, C, N), diag_flops(1, T, C, N)),
        (diag_bytes(1, T, C, N, backward=True), diag_flops(1, T, C, N, backward=True)),
    )


def _delta(device: torch.device, sizes: Sizes) -> CudaCase:
    """Gated DeltaNet with two value heads a key head, as Qwen3-Next has it."""
    H, K, T = sizes.attention_heads, sizes.attention_dim, sizes.tokens
    G = H // 2
    q, v = _leaf(device, 1, T, G, K, scale=K**-0.5), _leaf(device, 1, T, 1, H, K)
    k = F.normalize(torch.randn(1, T, 1, G, K, device=device), dim=-1).bfloat16().requires_grad_()
    beta, g = torch.rand(1, T, 1, H, device=device), -torch.rand(1, T, H, device=device)
    variants = _ours(lambda *leaves, backend: delta_scan(*leaves, backend=backend).o_BTHV)
    theirs = find("fla.ops.gated_delta_rule")
    if theirs is not None:

        def fla(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
            queries, keys = (x.repeat_interleave(H // G, dim=2) for x in (q, k[:, :, 0]))
            return theirs.chunk_gated_delta_rule(queries, keys, v[:, :, 0], g, beta[:, :, 0], scale=1.0)[0]

        variants["fla"] = fla
    shape = (1, T, 1, G, H, K, K)
    return CudaCase(
        "delta_scan",
        f"1x{T}, {G} key heads, {H} heads, states of {K} x {K}",
        (q, k, v, beta.requires_grad_(), g.requires_grad_()),
        variants,
        (delta_bytes(*shape), delta_flops(*shape, chunk_size=64)),
        (delta_bytes(*shape, backward=True), delta_flops(*shape, chunk_size=64, backward=True)),
    )


def _convolution(device: torch.device, sizes: Sizes) -> CudaCase:
    channels, T = sizes.heads * sizes.head_dim + 2 * sizes.state, sizes.tokens
    leaves = (_leaf(device, 1, T, channels), _leaf(device, channels, 4, scale=0.3), _leaf(device, channels))
    variants = _ours(lambda *leaves, backend: causal_conv1d(*leaves, backend=backend))
    theirs = find("causal_conv1d")
    if theirs is not None:
        variants["causal_conv1d"] = lambda x, w, bias: theirs.causal_conv1d_fn(
            x.transpose(1, 2), w, bias, activation="silu"
        ).transpose(1, 2)
    return CudaCase(
        "causal_conv1d",
        f"1x{T}x{channels}, width 4, SiLU",
        leaves,
        variants,
        (convolution_bytes(1, T, channels), convolution_flops(1, T, channels, 4)),
        (convolution_bytes(1, T, channels, backward=True), convolution_flops(1, T, channels, 4, backward=True)),
    )


def _norm(device: torch.device, sizes: Sizes) -> CudaCase:
    T, D = sizes.tokens, sizes.model
    variants = _ours(lambda x, weight, backend: rms_norm(x, weight, EPSILON, backend=backend))
    variants["torch_rms_norm"] = lambda x, weight: F.rms_norm(x, (D,), weight, EPSILON)
    theirs = find("liger_kernel.transformers.rms_norm")
    if theirs is not None:
        module = theirs.LigerRMSNorm(D, eps=EPSILON).to(device, torch.bfloat16)
        variants["liger_kernel"] = lambda x, weight: torch.func.functional_call(module, {"weight": weight}, (x,))
    return CudaCase(
        "rms_norm",
        f"{T}x{D}",
        (_leaf(device, T, D), _leaf(device, D)),
        variants,
        (norm_bytes(T * D), norm_flops(T * D)),
        (norm_bytes(T * D, backward=True), norm_flops(T * D, backward=True)),
    )


def _gated_norm(device: torch.device, sizes: Sizes) -> CudaCase:
    T, D = sizes.tokens, sizes.heads * sizes.head_dim
    variants = _ours(lambda y, z, weight, backend: gated_rms_norm(y, z, weight, EPSILON, backend=backend))
    theirs = find("mamba_ssm.ops.triton.layernorm_gated")
    if theirs is not None:
        variants["mamba_ssm"] = lambda y, z, weight: theirs.rmsnorm_fn(
            y, weight, None, z=z, eps=EPSILON, group_size=D, norm_before_gate=False
        )
    return CudaCase(
        "gated_rms_norm",
        f"{T}x{D}",
        (_leaf(device, T, D), _leaf(device, T, D), _leaf(device, D)),
        variants,
        (norm_bytes(T * D, gated=True), norm_flops(T * D, gated=True)),
        (norm_bytes(T * D, gated=True, backward=True), norm_flops(T * D, gated=True, backward=True)),
    )


def _swiglu(device: torch.device, sizes: Sizes) -> CudaCase:
    T, width = sizes.tokens, 2 * sizes.model
    variants = _ours(lambda x, backend: swiglu(x, backend=backend))
    theirs = find("liger_kernel.ops.swiglu")
    if theirs is not None:
        variants["liger_kernel"] = lambda x: theirs.LigerSiLUMulFunction.apply(
            *(half.contiguous() for half in x.chunk(2, dim=-1))
        )
    count = T * width
    return CudaCase(
        "swiglu",
        f"{T}x{width}",
        (_leaf(device, T, 2 * width),),
        variants,
        (swiglu_bytes(count, SIZE, backward=False), swiglu_flops(count, backward=False)),
        (swiglu_bytes(count, SIZE, backward=True), swiglu_flops(count, backward=True)),
    )


def _experts(device: torch.device, sizes: Sizes) -> CudaCase:
    T, D, E, F_, K = sizes.tokens, sizes.model, sizes.experts, sizes.expert_width, sizes.top_k
    ids = torch.randn(T, E, device=device).topk(K).indices

    def run(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, backend: str) -> Tensor:
        return expert_feed_forward(x, ids, weights, up, down, activation="swiglu", backend=backend)

    weights = torch.rand(T, K, device=device).requires_grad_()
    up, down = _leaf(device, E, 2 * F_, D, scale=D**-0.5), _leaf(device, E, D, F_, scale=F_**-0.5)
    flops = feed_forward_flops(T * K, D, F_, "swiglu")
    least = feed_forward_bytes(T, K, D, F_, E, "swiglu", SIZE)
    return CudaCase(
        "moe",
        f"{T}x{D}, {E} experts x {F_}, top {K}",
        (_leaf(device, T, D), weights, up, down),
        _ours(run),
        (least, flops),
        (2 * least, 2 * flops),
    )


def _attention(device: torch.device, sizes: Sizes) -> CudaCase:
    T, H, J, K = sizes.tokens, sizes.attention_heads, sizes.kv_heads, sizes.attention_dim
    leaves = tuple(_leaf(device, 1, T, heads, K) for heads in (H, J, J))
    shape = (1, T, H, J, K, SIZE)
    # The torch backend is PyTorch's scaled_dot_product_attention.
    return CudaCase(
        "attention",
        f"1x{T}, {H} heads and {J} of keys x {K}",
        leaves,
        _ours(lambda *leaves, backend: attention(*leaves, backend=backend)),
        (attention_bytes(*shape, backward=False), attention_flops(1, T, H, K, backward=False)),
        (attention_bytes(*shape, backward=True), attention_flops(1, T, H, K, backward=True)),
    )


def _head(device: torch.device, sizes: Sizes) -> CudaCase:
    T, D, V = sizes.tokens // 2, sizes.model, sizes.vocabulary
    labels = torch.randint(0, V, (T,), device=device)
    variants = _ours(
        lambda hidden, weight, backend: linear_cross_entropy(hidden, weight, labels, backend=backend).total
    )
    theirs = find("liger_kernel.transformers")
    if theirs is not None:
        loss = theirs.LigerFusedLinearCrossEntropyLoss(reduction="sum")
        variants["liger_kernel"] = lambda hidden, weight: loss(weight, hidden, labels)
    # Gradients are made in forward, so that the minimum of both passes stands there.
    least = (cross_entropy_bytes(T, V, D, SIZE), cross_entropy_flops(T, V, D, recompute=False))
    leaves = (_leaf(device, T, D), _leaf(device, V, D, scale=D**-0.5))
    return CudaCase("linear_cross_entropy", f"{T}x{D}x{V}", leaves, variants, least, (0, 0))


CUDA_OPERATIONS: dict[str, Callable[[torch.device, Sizes], CudaCase]] = {
    "decay_scan": _mamba2,
    "linear_attention": _linear_attention,
    "decay_scan_vector": _vector_scan,
    "diag_scan": _diagonal,
    "delta_scan": _delta,
    "causal_conv1d": _convolution,
    "rms_norm": _norm,
    "gated_rms_norm": _gated_norm,
    "swiglu": _swiglu,
    "moe": _experts,
    "attention": _attention,
    "linear_cross_entropy": _head,
}
