"""The router's choice: scores, the best k, weights of the chosen."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from amfm.kernels.moe.op import route, route_bytes
from amfm.kernels.proof.cases.case import (
    NOTHING,
    CountedProblem,
    Inputs,
    KernelLaunch,
    Minimum,
    OperationCase,
    Problem,
    bfloat16_inputs,
    kernel_launch,
)


def router_problem(inputs: Inputs, tokens: int, experts: int, top_k: int) -> Problem:
    """Softmax over the chosen, without groups, from float32 logits to weights.

    The leaf is logits [R, E]; of the results only the weights carry gradient here.
    """

    def run(logits: Tensor, backend: str) -> Tensor:
        return route(
            logits, None, score="softmax", top_k=top_k, normalize=True, scaling=1.0, backend=backend
        ).weights_RK

    return Problem(
        f"{tokens}, {experts} experts, top {top_k}",
        (inputs.normal(tokens, experts, dtype=torch.float32),),
        run,
        Minimum(route_bytes(tokens, experts, top_k), 0),
        NOTHING,
    )


def counted_problems() -> Iterator[CountedProblem]:
    """Forward alone; no goal is set."""
    yield CountedProblem("moe_route", router_problem(bfloat16_inputs(), 256, 64, 8), has_backward=False)


def launches() -> Iterator[KernelLaunch]:
    """Both kernels as Granite routes (softmax) and as DeepSeek-V3 does (sigmoid with bias, in groups)."""
    import triton

    from amfm.kernels.moe import triton_router as router

    floats = ("logits", "bias", "scores", "weights", "d_weights", "d_scores", "d_logits")
    types = dict.fromkeys(floats, "*fp32") | {"expert_ids": "*i64", "counts": "*i32", "scaling": "fp32"}
    types |= dict.fromkeys(("rows", "experts", "group_size"), "i32:16")
    types |= dict.fromkeys(("num_groups", "group_top_k", "top_k"), "i32")
    for label, softmax, groups, size, top_k in (("Granite, 64", True, 1, 64, 10), ("grouped, 256", False, 8, 32, 8)):
        width, choices = groups * size, triton.next_power_of_2(top_k)
        block = {"BLOCK": router.rows_of_block(width), "CHOICES": choices, "SOFTMAX": softmax, "NORMALIZE": True}
        forward = {"BIAS": not softmax, "LIMIT": groups > 1, "GROUPS": groups, "SIZE": size, **block}
        yield kernel_launch(f"router forward, {label}", router.route_forward_kernel, types, forward)
        backward = {"EXPERTS": width, **block}
        yield kernel_launch(f"router backward, {label}", router.route_backward_kernel, types, backward)


CASE = OperationCase("router", launches, counted_problems)
