"""Operations of a hybrid block, ours and as transformers' own modules compute them, over the same inputs.

Each case has variants of one computation: a function of its leaves that gives one output. transformers' code is called
as its models call it; where it has two ways (chunk sizes, expert loops) both are variants. `single_steps` is our own
definition, a loop over tokens that autograd differentiates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.causal_conv1d.op import causal_conv1d
from kernels.decay_scan.op import decay_scan, mamba2_scan
from kernels.delta_scan.op import delta_scan
from kernels.diag_scan.op import diag_scan
from kernels.linear.op import linear
from kernels.linear_cross_entropy.op import linear_cross_entropy
from kernels.moe.op import expert_feed_forward, route
from kernels.norm.op import gated_rms_norm, rms_norm

ROWS, TOKENS = 4, 512
HEADS, HEAD_DIM, STATE_SIZE = 8, 64, 128
SELECTIVE_STATE_SIZE = 16
# Experts as in Granite-4-H-Tiny, each of the width of the benchmark's model.
EXPERTS, TOP_K, EXPERT_WIDTH, MODEL_WIDTH = 64, 6, 64, 256
VOCABULARY = 8192
EPSILON = 1e-5

Compute = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One operation in one dtype: its leaves (what gets gradients), and each variant's function of them."""

    op: str
    shape: str
    dtype: torch.dtype
    leaves: tuple[Tensor, ...]
    variants: dict[str, Compute]


def build_case(op: str, dtype: torch.dtype) -> Case:
    """The case of one operation of `OPERATIONS`: all its variants see the same numbers, the same in every run."""
    torch.manual_seed(0)
    return OPERATIONS[op](dtype)


def _granite() -> Any:
    from transformers.models.granitemoehybrid import modeling_granitemoehybrid

    return modeling_granitemoehybrid


def _normal(dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype).requires_grad_()


def _scan(dtype: torch.dtype) -> Case:
    theirs = _granite().mamba2_chunk_scan
    x = _normal(dtype, ROWS, TOKENS, HEADS, HEAD_DIM)
    dt = _normal(dtype, ROWS, TOKENS, HEADS)
    B, C = (_normal(dtype, ROWS, TOKENS, 1, STATE_SIZE, scale=0.3) for _ in range(2))
    A_log, D, bias = (
        torch.rand(HEADS).requires_grad_(),
        torch.ones(HEADS).requires_grad_(),
        _normal(torch.float32, HEADS),
    )

    def ours(x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        return mamba2_scan(x, dt, A_log, B, C, D, bias, chunk_size=64).y_BTHP

    def transformers(chunk: int) -> Compute:
        def run(x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
            A = -torch.exp(A_log.float())
            return theirs(x, dt, A, B, C, chunk_size=chunk, D=D, dt_bias=bias, dt_softplus=True)

        return run

    variants = {"ours": ours, "transformers": transformers(256), "transformers_chunk_64": transformers(64)}
    shape = f"{ROWS}x{TOKENS}, {HEADS} heads x {HEAD_DIM}, state {STATE_SIZE}"
    return Case("decay_scan", shape, dtype, (x, dt, A_log, B, C, D, bias), variants)


def _vector_scan(dtype: torch.dtype) -> Case:
    shape = (ROWS, TOKENS, HEADS, HEAD_DIM)
    leaves = (
        *(_normal(dtype, *shape, scale=scale) for scale in (1.0, HEAD_DIM**-0.5, 1.0)),
        F.logsigmoid(torch.randn(shape)).requires_grad_(),
    )
    variants: dict[str, Compute] = {
        "ours": lambda q, k, v, g: decay_scan(q, k, v, g, chunk_size=64).o_BTHV,
        "single_steps": lambda q, k, v, g: decay_scan(q, k, v, g, backend="reference").o_BTHV,
    }
    sizes = f"{ROWS}x{TOKENS}, {HEADS} heads x {HEAD_DIM}, state {HEAD_DIM}"
    return Case("decay_scan_vector", sizes, dtype, leaves, variants)


def _selective_scan(dtype: torch.dtype) -> Case:
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    channels = HEADS * HEAD_DIM
    x, dt = _normal(dtype, 1, TOKENS, channels), _normal(dtype, 1, TOKENS, channels)
    B, C = (_normal(dtype, 1, TOKENS, SELECTIVE_STATE_SIZE, scale=0.3) for _ in range(2))
    A_log = torch.arange(1.0, SELECTIVE_STATE_SIZE + 1).log().repeat(channels, 1).requires_grad_()
    D, bias = torch.ones(channels).requires_grad_(), _normal(torch.float32, channels)

    def ours(backend: str) -> Compute:
        return lambda *leaves: diag_scan(*leaves, backend=backend).y_BTC

    def transformers(x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        x, dt, B, C = (t.transpose(1, 2) for t in (x, dt, B, C))
        y = mamba_selective_scan(x, dt, -A_log.exp(), B, C, D, delta_bias=bias, delta_softplus=True)
        return y.transpose(1, 2).to(x.dtype)

    variants = {"ours": ours("torch"), "single_steps": ours("reference"), "transformers": transformers}
    shape = f"1x{TOKENS}, {channels} channels, state {SELECTIVE_STATE_SIZE}"
    return Case("diag_scan", shape, dtype, (x, dt, A_log, B, C, D, bias), variants)


def _delta(dtype: torch.dtype) -> Case:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    q, v = (_normal(dtype, ROWS, TOKENS, HEADS, HEAD_DIM) for _ in range(2))
    k = F.normalize(torch.randn(ROWS, TOKENS, HEADS, HEAD_DIM), dim=-1).to(dtype).requires_grad_()
    beta = torch.rand(ROWS, TOKENS, HEADS).requires_grad_()
    g = F.logsigmoid(2 + torch.randn(ROWS, TOKENS, HEADS)).requires_grad_()

    def ours(backend: str) -> Compute:
        def run(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
            k, v, beta = (x.unsqueeze(2) for x in (k, v, beta))
            return delta_scan(q * HEAD_DIM**-0.5, k, v, beta, g, chunk_size=64, backend=backend).o_BTHV

        return run

    def transformers(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
        return torch_chunk_gated_delta_rule(q, k, v, g, beta, chunk_size=64)[0]

    variants = {"ours": ours("torch"), "single_steps": ours("reference"), "transformers": transformers}
    shape = f"{ROWS}x{TOKENS}, {HEADS} heads x {HEAD_DIM}, state {HEAD_DIM}"
    return Case("delta_scan", shape, dtype, (q, k, v, beta, g), variants)


def _gated_norm(dtype: torch.dtype) -> Case:
    width = HEADS * HEAD_DIM
    module = _granite().GraniteMoeHybridRMSNormGated(width, group_size=width, eps=EPSILON).to(dtype)
    leaves = (*(_normal(dtype, ROWS, TOKENS, width) for _ in range(2)), _normal(dtype, width))
    variants: dict[str, Compute] = {
        "ours": lambda y, z, weight: gated_rms_norm(y, z, weight, EPSILON),
        "transformers": lambda y, z, weight: torch.func.functional_call(module, {"weight": weight}, (y, z)),
    }
    return Case("gated_rms_norm", f"{ROWS}x{TOKENS}x{width}", dtype, leaves, variants)


def _convolution(dtype: torch.dtype) -> Case:
    theirs = _granite().causal_conv1d_fn
    channels = HEADS * HEAD_DIM + 2 * STATE_SIZE
    x, weight = _normal(dtype, ROWS, TOKENS, channels), _normal(dtype, channels, 4, scale=0.3)
    variants: dict[str, Compute] = {
        "ours": causal_conv1d,
        "transformers": lambda x, w, bias: theirs(x.transpose(1, 2), w, bias, activation="silu").transpose(1, 2),
    }
    leaves = (x, weight, _normal(dtype, channels))
    return Case("causal_conv1d", f"{ROWS}x{TOKENS}x{channels}, width 4, SiLU", dtype, leaves, variants)


def _experts(dtype: torch.dtype) -> Case:
    granite = _granite()

    def transformers(way: str) -> Compute:
        config = granite.GraniteMoeHybridConfig(
            hidden_size=MODEL_WIDTH,
            intermediate_size=EXPERT_WIDTH,
            num_local_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
        )
        config._experts_implementation = way
        with torch.device("meta"):
            module = granite.GraniteMoeHybridMoE(config)

        def run(x: Tensor, router: Tensor, up: Tensor, down: Tensor) -> Tensor:
            weights = {"router.weight": router, "experts.gate_up_proj": up, "experts.down_proj": down}
            return torch.func.functional_call(module, weights, (x,))

        return run

    def ours(x: Tensor, router: Tensor, up: Tensor, down: Tensor) -> Tensor:
        rows = x.reshape(-1, MODEL_WIDTH)
        logits = linear(rows, router).float()
        chosen = route(logits, None, score="softmax", top_k=TOP_K, normalize=True, scaling=1.0)
        y = expert_feed_forward(rows, chosen.expert_ids_RK, chosen.weights_RK, up, down, activation="swiglu")
        return y.view_as(x)

    leaves = (
        _normal(dtype, ROWS, TOKENS, MODEL_WIDTH),
        _normal(dtype, EXPERTS, MODEL_WIDTH, scale=MODEL_WIDTH**-0.5),
        _normal(dtype, EXPERTS, 2 * EXPERT_WIDTH, MODEL_WIDTH, scale=MODEL_WIDTH**-0.5),
        _normal(dtype, EXPERTS, MODEL_WIDTH, EXPERT_WIDTH, scale=EXPERT_WIDTH**-0.5),
    )
    shape = f"{ROWS * TOKENS}x{MODEL_WIDTH}, {EXPERTS} experts x {EXPERT_WIDTH}, top {TOP_K}"
    variants = {
        "ours": ours,
        "transformers": transformers("grouped_mm"),  # what its models take by default
        "transformers_loop": transformers("eager"),
    }
    return Case("moe", shape, dtype, leaves, variants)


def _norm(dtype: torch.dtype) -> Case:
    width = 1024
    module = _granite().GraniteMoeHybridRMSNorm(width, eps=EPSILON).to(dtype)
    variants: dict[str, Compute] = {
        "ours": lambda x, weight: rms_norm(x, weight, EPSILON),
        "transformers": lambda x, weight: torch.func.functional_call(module, {"weight": weight}, (x,)),
    }
    leaves = (_normal(dtype, ROWS, TOKENS, width), _normal(dtype, width))
    return Case("rms_norm", f"{ROWS}x{TOKENS}x{width}", dtype, leaves, variants)


def _head(dtype: torch.dtype) -> Case:
    from transformers.loss.loss_utils import ForCausalLMLoss

    labels = torch.randint(0, VOCABULARY, (ROWS, TOKENS))

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        rows = hidden.view(-1, MODEL_WIDTH)
        return linear_cross_entropy(rows, weight, labels.view(-1)).total / labels.numel()

    def transformers(hidden: Tensor, weight: Tensor) -> Tensor:
        return ForCausalLMLoss(F.linear(hidden, weight), labels, VOCABULARY, shift_labels=labels)

    leaves = (
        _normal(dtype, ROWS, TOKENS, MODEL_WIDTH),
        _normal(dtype, VOCABULARY, MODEL_WIDTH, scale=MODEL_WIDTH**-0.5),
    )
    shape = f"{ROWS * TOKENS}x{MODEL_WIDTH}x{VOCABULARY}"
    return Case("linear_cross_entropy", shape, dtype, leaves, {"ours": ours, "transformers": transformers})


OPERATIONS: dict[str, Callable[[torch.dtype], Case]] = {
    "decay_scan": _scan,
    "decay_scan_vector": _vector_scan,
    "diag_scan": _selective_scan,
    "delta_scan": _delta,
    "gated_rms_norm": _gated_norm,
    "causal_conv1d": _convolution,
    "moe": _experts,
    "rms_norm": _norm,
    "linear_cross_entropy": _head,
}
