"""The calls that `amfm bench kernels --audit` counts: bfloat16, small enough for the interpreter, long enough to stand for more.

Rows are long where something is written once a row (states), so that it weighs as little as in production.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention.op import attention, attention_bytes, attention_flops
from kernels.causal_conv1d.op import causal_conv1d, convolution_bytes, convolution_flops
from kernels.decay_scan.op import decay_scan, mamba2_scan, scan_bytes, scan_flops, vector_scan_bytes
from kernels.delta_scan.op import delta_bytes, delta_flops, delta_scan
from kernels.diag_scan.op import diag_bytes, diag_flops, diag_scan
from kernels.linear_cross_entropy.op import cross_entropy_bytes, cross_entropy_flops, linear_cross_entropy
from kernels.moe.op import expert_feed_forward, feed_forward_bytes, feed_forward_flops, route, route_bytes
from kernels.norm.op import gated_rms_norm, norm_bytes, norm_flops, rms_norm
from kernels.rope.op import qk_norm_rope, qk_norm_rope_bytes, qk_norm_rope_flops, rope_frequencies
from kernels.swiglu.op import (
    squared_relu,
    squared_relu_bytes,
    swiglu,
    swiglu_bytes,
    swiglu_flops,
)
from launch.bench.kernels.case import AuditCase, Goal

BF16 = torch.bfloat16
SIZE = 2
EPSILON = 1e-5
HEAD_DIM, STATE_SIZE = 64, 128


def _leaf(*shape: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype).requires_grad_()


def _mamba_leaves(tokens: int, heads: int) -> tuple[Tensor, ...]:
    x, dt = _leaf(1, tokens, heads, HEAD_DIM), _leaf(1, tokens, heads)
    B, C = (_leaf(1, tokens, 1, STATE_SIZE, scale=0.3) for _ in range(2))
    A_log, D, bias = (_leaf(heads, dtype=torch.float32) for _ in range(3))
    return x, dt, A_log, B, C, D, bias


def _scan_case(name: str, tokens: int, heads: int, chunk: int, *, keep_states: bool) -> AuditCase:
    """One row of the Mamba2 scan, forward in one walk and backward.

    Each goal is one of a policy: forward's where backward walks the row again, backward's where the states are kept.
    """
    width = heads * HEAD_DIM
    sizes = (1, tokens, heads, 1, STATE_SIZE, HEAD_DIM)
    least = tokens * (4 * width + 4 * STATE_SIZE + 4 * heads)

    def run(x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        return mamba2_scan(
            x, dt, A_log, B, C, D, bias, chunk_size=chunk, keep_states=keep_states, backend="triton"
        ).y_BTHP

    return AuditCase(
        op=name,
        shape=f"1x{tokens}, {heads} heads x {HEAD_DIM}, state {STATE_SIZE}, chunks of {chunk}",
        leaves=_mamba_leaves(tokens, heads),
        run=run,
        forward=(scan_bytes(*sizes), scan_flops(*sizes, chunk_size=chunk)),
        backward=(scan_bytes(*sizes, backward=True), scan_flops(*sizes, chunk_size=chunk, backward=True)),
        forward_goal=None if keep_states else Goal("4d + 4GN + 4H bytes a token", least, 1.15),
        backward_goal=Goal("d bytes a token", tokens * width, 16) if keep_states else None,
    )


def _scans() -> Iterator[AuditCase]:
    # Only forward: the goal of backward is one of chunks of 128.
    short = _scan_case("decay_scan", tokens=2048, heads=8, chunk=64, keep_states=False)
    yield dataclasses.replace(short, backward=None)
    yield _scan_case("decay_scan", tokens=2048, heads=16, chunk=128, keep_states=False)
    yield _scan_case("decay_scan_states_kept", tokens=2048, heads=16, chunk=128, keep_states=True)
    yield _segmented_scan(tokens=8192, heads=4, chunk=128, segments=2)


def _segmented_scan(tokens: int, heads: int, chunk: int, segments: int) -> AuditCase:
    """The walk cut into segments, as long rows with few heads are."""
    from kernels.decay_scan.triton_impl import scan_triton

    width = heads * HEAD_DIM
    sizes = (1, tokens, heads, 1, STATE_SIZE, HEAD_DIM)
    x, dt, _, B, C, D, _ = (leaf.detach() for leaf in _mamba_leaves(tokens, heads))
    scale = dt.float().abs()
    least = tokens * (4 * width + 4 * STATE_SIZE + 4 * heads)

    def run(x: Tensor) -> Tensor:
        per_segment = tokens // chunk // segments
        return scan_triton(C, B, x, -scale, scale, D, None, None, chunk, segment_chunks=per_segment)[0]

    return AuditCase(
        op="decay_scan_segmented",
        shape=f"1x{tokens}, {heads} heads x {HEAD_DIM}, state {STATE_SIZE}, {segments} segments",
        leaves=(x,),
        run=run,
        forward=(scan_bytes(*sizes), scan_flops(*sizes, chunk_size=chunk)),
        backward=None,
        forward_goal=Goal("4d + 4GN + 4H bytes a token", least, 1.7),
    )


def _vector_scans() -> Iterator[AuditCase]:
    """One head of HGRN2 with states kept and made again, and of GLA at a width of 2048."""
    for tokens, K, V, keep_states in ((512, 128, 128, True), (512, 128, 128, False), (1024, 256, 512, False)):
        sizes, products = (1, tokens, 1, K, V), (1, tokens, 1, 1, K, V)
        least = [vector_scan_bytes(*sizes, backward=way) for way in (False, True)]
        flops = [scan_flops(*products, chunk_size=64, backward=way) for way in (False, True)]

        def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, keep_states: bool = keep_states) -> Tensor:
            return decay_scan(q, k, v, g, keep_states=keep_states, backend="triton").o_BTHV

        gate = (-torch.rand(1, tokens, 1, K)).requires_grad_()
        yield AuditCase(
            op="decay_scan_vector_states_kept" if keep_states else "decay_scan_vector",
            shape=f"1x{tokens}, 1 head, states of {K} x {V}, chunks of 64",
            leaves=(_leaf(1, tokens, 1, K, scale=K**-0.5), _leaf(1, tokens, 1, K), _leaf(1, tokens, 1, V), gate),
            run=run,
            forward=(least[0], flops[0]),
            backward=(least[1], flops[1]),
            forward_goal=None if keep_states else Goal("of the formula", least[0], 2),
            backward_goal=Goal("of the formula", least[1], 5),
        )


def _diagonals() -> Iterator[AuditCase]:
    """One block of channels of Mamba."""
    tokens, channels, states = 512, 64, 16
    rows = (_leaf(1, tokens, channels), _leaf(1, tokens, channels))
    shared = (_leaf(1, tokens, states), _leaf(1, tokens, states))
    A_log, D, bias = (_leaf(*shape, dtype=torch.float32) for shape in ((channels, states), (channels,), (channels,)))
    sizes = (1, tokens, channels, states)
    least = [diag_bytes(*sizes, backward=way) for way in (False, True)]
    yield AuditCase(
        op="diag_scan",
        shape=f"1x{tokens}x{channels}, {states} state numbers, chunks of 64",
        leaves=(*rows, A_log, *shared, D, bias),
        run=lambda *leaves: diag_scan(*leaves, backend="triton").y_BTC,
        forward=(least[0], diag_flops(*sizes)),
        backward=(least[1], diag_flops(*sizes, backward=True)),
        forward_goal=Goal("of the formula", least[0], 1.2),
        backward_goal=Goal("of the formula", least[1], 1.4),
    )


def _deltas() -> Iterator[AuditCase]:
    """One row of Gated DeltaNet, with two value heads a key head and states as Qwen3-Next has them."""
    tokens, key_heads, heads, size, chunk = 1024, 2, 4, STATE_SIZE, 64
    q, v = _leaf(1, tokens, key_heads, size), _leaf(1, tokens, 1, heads, size)
    k = F.normalize(torch.randn(1, tokens, 1, key_heads, size), dim=-1).to(BF16).requires_grad_()
    beta = torch.rand(1, tokens, 1, heads).requires_grad_()
    g = (-torch.rand(1, tokens, heads)).requires_grad_()
    sizes = (1, tokens, 1, key_heads, heads, size, size)
    yield AuditCase(
        op="delta_scan",
        shape=f"1x{tokens}, {key_heads} key heads, {heads} heads, states of {size} x {size}, chunks of {chunk}",
        leaves=(q, k, v, beta, g),
        run=lambda *leaves: delta_scan(*leaves, chunk_size=chunk, backend="triton").o_BTHV,
        forward=(delta_bytes(*sizes), delta_flops(*sizes, chunk_size=chunk)),
        backward=(delta_bytes(*sizes, backward=True), delta_flops(*sizes, chunk_size=chunk, backward=True)),
        forward_goal=Goal("of the formula", delta_bytes(*sizes), 2.2),
        backward_goal=Goal("of the formula", delta_bytes(*sizes, backward=True), 5),
    )


def _convolutions() -> Iterator[AuditCase]:
    tokens, channels, width = 512, 128, 4
    least = [convolution_bytes(1, tokens, channels, backward=way) for way in (False, True)]
    flops = [convolution_flops(1, tokens, channels, width, backward=way) for way in (False, True)]
    yield AuditCase(
        op="causal_conv1d",
        shape=f"1x{tokens}x{channels}, width {width}",
        leaves=(_leaf(1, tokens, channels), _leaf(channels, width), _leaf(channels)),
        run=lambda x, weight, bias: causal_conv1d(x, weight, bias, backend="triton"),
        forward=(least[0], flops[0]),
        backward=(least[1], flops[1]),
        forward_goal=Goal("of the formula", least[0], 1.1),
        backward_goal=Goal("of the formula", least[1], 1.1),
    )


def _norms() -> Iterator[AuditCase]:
    rows, width = 512, 512
    values = rows * width

    def pair(which: str, backward: bool) -> tuple[int, int]:
        gated, residual = which == "gated_rms_norm", which == "rms_norm_residual"
        moved = norm_bytes(values, gated=gated, residual=residual, backward=backward)
        return moved, norm_flops(values, gated=gated, backward=backward)

    def with_residual(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        y, h = rms_norm(x, weight, EPSILON, residual=residual, backend="triton")
        return torch.stack([y, h])

    runs: dict[str, Callable[..., Tensor]] = {
        "rms_norm": lambda x, weight: rms_norm(x, weight, EPSILON, backend="triton"),
        "rms_norm_residual": with_residual,
        "gated_rms_norm": lambda y, z, weight: gated_rms_norm(y, z, weight, EPSILON, backend="triton"),
    }
    for name, run in runs.items():
        inputs = (_leaf(rows, width),) * (1 if name == "rms_norm" else 2)
        leaves = (*(each.detach().clone().requires_grad_() for each in inputs), _leaf(width))
        forward, backward = pair(name, False), pair(name, True)
        yield AuditCase(
            op=name,
            shape=f"{rows}x{width}",
            leaves=leaves,
            run=run,
            forward=forward,
            backward=backward,
            forward_goal=Goal("of the formula", forward[0], 1.1),
            backward_goal=Goal("of the formula", backward[0], 1.1),
        )


def _activations() -> Iterator[AuditCase]:
    rows, width = 256, 512
    count = rows * width
    for name, run, count_bytes, leaf in (
        ("swiglu", swiglu, swiglu_bytes, _leaf(rows, 2 * width)),
        ("squared_relu", squared_relu, squared_relu_bytes, _leaf(rows, width)),
    ):
        forward, backward = (count_bytes(count, SIZE, backward=way) for way in (False, True))
        flops = [swiglu_flops(count, backward=way) if name == "swiglu" else count * (2 + way) for way in (False, True)]
        yield AuditCase(
            op=name,
            shape=f"{rows}x{width}",
            leaves=(leaf,),
            run=lambda x, run=run: run(x, backend="triton"),
            forward=(forward, flops[0]),
            backward=(backward, flops[1]),
            forward_goal=Goal("of the formula", forward, 1.05),
            backward_goal=Goal("of the formula", backward, 1.05),
        )


def _rotations() -> Iterator[AuditCase]:
    tokens, heads, kv_heads, size = 256, 8, 2, 64
    frequencies, factor = rope_frequencies(size, theta=10000.0)
    positions = torch.arange(tokens)[None]

    def run(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
        q, k = qk_norm_rope(
            q, k, positions, frequencies, factor, q_weight_K=q_weight, k_weight_K=k_weight, backend="triton"
        )
        return torch.cat([q, k], dim=2)

    least = [qk_norm_rope_bytes(tokens, heads + kv_heads, size, SIZE, backward=way) for way in (False, True)]
    flops = [qk_norm_rope_flops(tokens, heads + kv_heads, size, backward=way) for way in (False, True)]
    yield AuditCase(
        op="qk_norm_rope",
        shape=f"1x{tokens}, {heads} + {kv_heads} heads x {size}",
        leaves=(_leaf(1, tokens, heads, size), _leaf(1, tokens, kv_heads, size), _leaf(size), _leaf(size)),
        run=run,
        forward=(least[0], flops[0]),
        backward=(least[1], flops[1]),
    )


def _attentions() -> Iterator[AuditCase]:
    tokens, heads, kv_heads, size = 256, 4, 2, 64
    least = [attention_bytes(1, tokens, heads, kv_heads, size, SIZE, backward=way) for way in (False, True)]
    flops = [attention_flops(1, tokens, heads, size, backward=way) for way in (False, True)]
    yield AuditCase(
        op="attention",
        shape=f"1x{tokens}, {heads} heads and {kv_heads} of keys x {size}",
        leaves=(_leaf(1, tokens, heads, size), _leaf(1, tokens, kv_heads, size), _leaf(1, tokens, kv_heads, size)),
        run=lambda q, k, v: attention(q, k, v, backend="triton"),
        forward=(least[0], flops[0]),
        backward=(least[1], flops[1]),
    )


def _experts() -> Iterator[AuditCase]:
    tokens, model, hidden, experts, top_k = 256, 128, 64, 8, 2
    ids = torch.randn(tokens, experts).topk(top_k).indices
    for activation, width in (("swiglu", 2 * hidden), ("squared_relu", hidden)):
        least = feed_forward_bytes(tokens, top_k, model, hidden, experts, activation, SIZE)
        flops = feed_forward_flops(tokens * top_k, model, hidden, activation)

        def run(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, activation: str = activation) -> Tensor:
            return expert_feed_forward(x, ids, weights, up, down, activation=activation, backend="triton")

        leaves = (
            _leaf(tokens, model),
            _leaf(tokens, top_k, dtype=torch.float32),
            _leaf(experts, width, model, scale=model**-0.5),
            _leaf(experts, model, hidden, scale=hidden**-0.5),
        )
        pairs, weights = tokens * top_k, experts * model * (width + hidden)
        # Read x, dy, hidden and weights; write dx and weight gradients; write and read the hidden gradient, the
        # activation and the rows of dx.
        backward = SIZE * (3 * tokens * model + 2 * weights + pairs * (3 * width + 2 * hidden + 2 * model))
        yield AuditCase(
            op=f"moe_{activation}",
            shape=f"{tokens}x{model}, {experts} experts x {hidden}, top {top_k}",
            leaves=leaves,
            run=run,
            forward=(least, flops),
            backward=(backward, 2 * flops),
            forward_goal=Goal("of the formula", least, 1.3),
        )


def _routers() -> Iterator[AuditCase]:
    tokens, experts, top_k = 256, 64, 8

    def run(logits: Tensor) -> Tensor:
        return route(
            logits, None, score="softmax", top_k=top_k, normalize=True, scaling=1.0, backend="triton"
        ).weights_RK

    least = route_bytes(tokens, experts, top_k)
    yield AuditCase(
        op="moe_route",
        shape=f"{tokens}, {experts} experts, top {top_k}",
        leaves=(_leaf(tokens, experts, dtype=torch.float32),),
        run=run,
        forward=(least, 0),
        backward=None,
    )


def _heads() -> Iterator[AuditCase]:
    rows, vocab, model = 128, 512, 128
    labels = torch.randint(0, vocab, (rows,))
    products = 4 * rows * vocab * model
    # Each of the two products of a slice reads the logits' gradient and the weight or hidden, and writes its result.
    library = 2 * SIZE * (rows * vocab + vocab * model + rows * model)
    yield AuditCase(
        op="linear_cross_entropy",
        shape=f"{rows}x{model}x{vocab}",
        leaves=(_leaf(rows, model), _leaf(vocab, model, scale=model**-0.5)),
        run=lambda hidden, weight: linear_cross_entropy(hidden, weight, labels, backend="triton").total,
        forward=(
            cross_entropy_bytes(rows, vocab, model, SIZE),
            cross_entropy_flops(rows, vocab, model, recompute=False),
        ),
        backward=None,
        forward_goal=Goal("reads of each float32 logit", 4 * rows * vocab, 2),
        library=(products, library),
    )


BUILDERS: dict[str, Callable[[], Iterator[AuditCase]]] = {
    "decay_scan": _scans,
    "decay_scan_vector": _vector_scans,
    "diag_scan": _diagonals,
    "delta_scan": _deltas,
    "causal_conv1d": _convolutions,
    "norm": _norms,
    "swiglu": _activations,
    "rope": _rotations,
    "attention": _attentions,
    "moe": _experts,
    "router": _routers,
    "linear_cross_entropy": _heads,
}
