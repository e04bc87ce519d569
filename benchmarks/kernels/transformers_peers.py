"""Operations of a hybrid block as transformers' own modules compute them, over the inputs of our cases.

transformers' code is called as its models call it; where it has two ways (chunk sizes, expert loops) both are variants.
`single_steps` is our own definition, a loop over tokens that autograd differentiates.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amfm.kernels.cases import EPSILON, Compute, HostSizes, Problem

Variants = dict[str, Compute]
# Operations whose definition, a token at a time, is timed too.
SINGLE_STEPS = ("decay_scan_vector", "diag_scan", "delta_scan")


def add_transformers(op: str, problem: Problem, dtype: torch.dtype, sizes: HostSizes) -> Variants:
    """All variants of a problem of `ON_HOST`: ours first, then what it is compared with."""
    ours = partial(_scaled, problem) if op == "delta_scan" else problem.on
    variants: Variants = {"ours": ours("torch")}
    if op in SINGLE_STEPS:
        variants["single_steps"] = ours("reference")
    if op in TRANSFORMERS:
        variants |= TRANSFORMERS[op](problem, dtype, sizes)
    return variants


def _scaled(problem: Problem, backend: str) -> Compute:
    """As transformers' delta rule does it, which scales queries itself."""

    def run(q: Tensor, *rest: Tensor) -> Tensor:
        return problem.on(backend)(q * q.shape[-1] ** -0.5, *rest)

    return run


def _granite() -> Any:
    from transformers.models.granitemoehybrid import modeling_granitemoehybrid

    return modeling_granitemoehybrid


def _scan(problem: Problem, dtype: torch.dtype, sizes: HostSizes) -> Variants:
    """Mamba2's chunked scan of transformers, with its default chunk of 256 and with one of 64."""
    theirs = _granite().mamba2_chunk_scan

    def chunked(chunk: int) -> Compute:
        def run(x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
            A = -torch.exp(A_log.float())
            return theirs(x, dt, A, B, C, chunk_size=chunk, D=D, dt_bias=bias, dt_softplus=True)

        return run

    return {"transformers": chunked(256), "transformers_chunk_64": chunked(64)}


def _selective_scan(problem: Problem, dtype: torch.dtype, sizes: HostSizes) -> Variants:
    """Mamba1's selective scan of transformers, which takes channels before time."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    def run(x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        x, dt, B, C = (t.transpose(1, 2) for t in (x, dt, B, C))
        y = mamba_selective_scan(x, dt, -A_log.exp(), B, C, D, delta_bias=bias, delta_softplus=True)
        return y.transpose(1, 2).to(x.dtype)

    return {"transformers": run}


def _delta(problem: Problem, dtype: torch.dtype, sizes: HostSizes) -> Variants:
    """Gated delta rule of transformers in chunks of 64; it has one update a token and no axis for more."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    def run(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
        k, v, beta = (each.squeeze(2) for each in (k, v, beta))
        return torch_chunk_gated_delta_rule(q, k, v, g, beta, chunk_size=64)[0]

    return {"transformers": run}


def _gated_norm(problem: Problem, dtype: torch.dtype, sizes: HostSizes) -> Variants:
    width = problem.tensors[0].shape[-1]
    module = _granite().GraniteMoeHybridRMSNormGated(width, group_size=width, eps=EPSILON).to(dtype)
    return {"transformers": lambda y, z, weight: torch.func.functional_call(module, {"weight": weight}, (y, z))}


def _norm(problem: Problem, dtype: torch.dtype, sizes: HostSizes) -> Variants:
    module = _granite().GraniteMoeHybridRMSNorm(problem.tensors[0].shape[-1], eps=EPSILON).to(dtype)
    return {"transformers": lambda x, weight: torch.func.functional_call(module, {"weight": weight}, (x,))}


def _convolution(problem: Problem, dtype: torch.dtype, sizes: HostSizes) -> Variants:
    theirs = _granite().causal_conv1d_fn
    return {"transformers": lambda x, w, bias: theirs(x.transpose(1, 2), w, bias, activation="silu").transpose(1, 2)}


def _experts(problem: Problem, dtype: torch.dtype, sizes: HostSizes) -> Variants:
    """An expert block of transformers by grouped products and by its loop over experts."""
    granite = _granite()

    def block(way: str) -> Compute:
        config = granite.GraniteMoeHybridConfig(
            hidden_size=sizes.model,
            intermediate_size=sizes.expert_width,
            num_local_experts=sizes.experts,
            num_experts_per_tok=sizes.top_k,
        )
        config._experts_implementation = way
        # Built without weights: every call brings ours.
        with torch.device("meta"):
            module = granite.GraniteMoeHybridMoE(config)

        def run(x: Tensor, router: Tensor, up: Tensor, down: Tensor) -> Tensor:
            weights = {"router.weight": router, "experts.gate_up_proj": up, "experts.down_proj": down}
            rows = x.view(sizes.rows, sizes.tokens, sizes.model)
            y: Tensor = torch.func.functional_call(module, weights, (rows,))
            return y.view_as(x)

        return run

    # Grouped products are what its models take by default.
    return {"transformers": block("grouped_mm"), "transformers_loop": block("eager")}


def _head(problem: Problem, dtype: torch.dtype, sizes: HostSizes) -> Variants:
    """Logits whole and transformers' causal loss over them."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    labels = problem.labels
    assert labels is not None, "the head's problem has labels"

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        return ForCausalLMLoss(F.linear(hidden, weight), labels, sizes.vocabulary, shift_labels=labels)

    return {"transformers": run}


TRANSFORMERS: dict[str, Callable[[Problem, torch.dtype, HostSizes], Variants]] = {
    "decay_scan": _scan,
    "diag_scan": _selective_scan,
    "delta_scan": _delta,
    "gated_rms_norm": _gated_norm,
    "causal_conv1d": _convolution,
    "moe": _experts,
    "rms_norm": _norm,
    "linear_cross_entropy": _head,
}
