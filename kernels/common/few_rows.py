"""Norm, router and experts of few rows in C, for decoding in float32: no sort, no loop over all experts in Python.

Every pair of a row and an expert is a product of its own, so what a row gets does not depend on the rows next to it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from amfm.kernels.runtime.native import EXPERT_ROWS, NORM_ROWS, ROUTE_ROWS, call_native, find_openmp

_SCORES = ("softmax", "sigmoid")  # by number; the third is the root of the softplus

MOST_ROWS = 64  # of tokens that are decoded at once: as many texts as `amfm serve` continues


def takes_few_rows(rows: Tensor, *others: Tensor) -> bool:
    """Whether C code computes these rows [..., D], for decoding: few, float32 on a CPU, without gradients.

    The number of rows decides, and up to it a row's bits do not depend on it: an answer must not depend on who else is served.
    """
    if torch.is_grad_enabled() or rows.numel() > MOST_ROWS * rows.shape[-1]:
        return False
    are_float32 = all(x.dtype == torch.float32 and x.device.type == "cpu" for x in (rows, *others))
    return are_float32 and not torch.compiler.is_compiling()


def rms_norm_rows(x: Tensor, weight_D: Tensor, epsilon: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """y and h of `rms_norm`, [..., D], as there; no gradients. Bits of a row do not depend on the number of rows."""
    x = x.contiguous()
    h, y = x if residual is None else torch.empty_like(x), torch.empty_like(x)
    tensors = {
        "x": x,
        "residual": None if residual is None else residual.contiguous(),
        "weight": weight_D,
        "h": h,
        "y": y,
    }
    integers = {"rows": x.numel() // x.shape[-1], "width": x.shape[-1]}
    call_native(NORM_ROWS, "norm_forward", integers, {"epsilon": epsilon}, tensors)
    return y, h


def route_rows(
    logits_RE: Tensor, expert_bias_E: Tensor | None, score: str, top_k: int, normalize: bool, scaling: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids [R, K], weights [R, K], how many pairs chose each expert [E], scores [R, E], as `route`; no gradients, no groups."""
    rows, experts = logits_RE.shape
    integers = {
        "rows": rows,
        "experts": experts,
        "top_k": top_k,
        "score": _SCORES.index(score) if score in _SCORES else len(_SCORES),
        "normalize": int(normalize),
    }
    weights, scores = torch.empty(rows, top_k), torch.empty(rows, experts)
    ids, counts = torch.empty(rows, top_k, dtype=torch.int64), torch.zeros(experts, dtype=torch.int64)
    tensors = {
        "logits": logits_RE.contiguous(),
        "bias": expert_bias_E,
        "scores": scores,
        "weights": weights,
        "ids": ids,
        "counts": counts,
    }
    call_native(ROUTE_ROWS, "route_forward", integers, {"scaling": scaling}, tensors)
    return ids, weights, counts, scores


def expert_feed_forward_rows(
    x_RD: Tensor,
    expert_ids_RK: Tensor,
    weights_RK: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    activate: Callable[[Tensor], Tensor],
) -> Tensor:
    """Sum over each token's K chosen experts of weight times feed-forward, as `expert_feed_forward`; no gradients."""
    rows, top_k = expert_ids_RK.shape
    ids = expert_ids_RK.long().contiguous()
    hidden = torch.empty(rows * top_k, up_EFD.shape[1])
    _multiply(up_EFD, x_RD.contiguous(), ids, None, hidden)
    y = torch.empty(rows, down_EDF.shape[1])
    _multiply(down_EDF, activate(hidden), ids, weights_RK.contiguous(), y)
    return y


def _multiply(matrices: Tensor, x: Tensor, ids_RK: Tensor, weights_RK: Tensor | None, y: Tensor) -> None:
    """Write to y the product of each pair's row and its expert's matrix; with weights, a row's weighted sum of them."""
    experts, outputs, inputs = matrices.shape
    integers = {
        "pairs": ids_RK.numel(),
        "experts": experts,
        "outputs": outputs,
        "inputs": inputs,
        "top_k": ids_RK.shape[1],
        "threads": torch.get_num_threads(),
        "next": 0,
    }
    tensors = {"matrices": matrices.contiguous(), "x": x, "weights": weights_RK, "ids": ids_RK, "y": y}
    call_native(EXPERT_ROWS, "rows_forward", integers, {}, tensors, parallel=find_openmp())
