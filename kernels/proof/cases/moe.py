"""Routed experts: gather, grouped products, weighted sum; with the router before them where a block is timed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.linear.op import linear
from kernels.moe.op import expert_feed_forward, feed_forward_bytes, feed_forward_flops, route
from kernels.proof.cases.case import (
    CardSizes,
    CountedProblem,
    Goal,
    HostSizes,
    Inputs,
    KernelLaunch,
    Minimum,
    OperationCase,
    Problem,
    bfloat16_inputs,
    kernel_launch,
)

VALUE_BYTES = 2


def experts_problem(
    inputs: Inputs, tokens: int, model: int, experts: int, width: int, top_k: int, activation: str = "swiglu"
) -> Problem:
    """Experts of inner width `width` over tokens whose choices are random and given.

    Leaves: x [R, D], weights [R, K] float32, up [E, F, D], down [E, D, width]. Choices are fixed, so that every
    backend and every run does the same work.
    """
    ids = torch.randn(tokens, experts, device=inputs.device).topk(top_k).indices
    rows = 2 * width if activation == "swiglu" else width
    leaves = (
        inputs.normal(tokens, model),
        inputs.uniform(tokens, top_k),
        inputs.normal(experts, rows, model, scale=model**-0.5),
        inputs.normal(experts, model, width, scale=width**-0.5),
    )

    def run(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, backend: str) -> Tensor:
        return expert_feed_forward(x, ids, weights, up, down, activation=activation, backend=backend)

    pairs, numbers = tokens * top_k, experts * model * (rows + width)
    # Read x, dy, hidden and weights; write dx and weight gradients; write and read the hidden gradient, the activation
    # and the rows of dx.
    moved = VALUE_BYTES * (3 * tokens * model + 2 * numbers + pairs * (3 * rows + 2 * width + 2 * model))
    flops = feed_forward_flops(pairs, model, width, activation)
    return Problem(
        f"{tokens}x{model}, {experts} experts x {width}, top {top_k}",
        leaves,
        run,
        Minimum(feed_forward_bytes(tokens, top_k, model, width, experts, activation, VALUE_BYTES), flops),
        Minimum(moved, 2 * flops),
    )


def block_problem(inputs: Inputs, tokens: int, model: int, experts: int, width: int, top_k: int) -> Problem:
    """The whole block of SwiGLU experts: router product, softmax over the chosen, experts.

    Its minima are those of the experts alone, beside which the router's are small.
    """
    inner = experts_problem(inputs, tokens, model, experts, width, top_k)
    x, _, up, down = inner.leaves
    router = inputs.normal(experts, model, scale=model**-0.5)

    def run(x: Tensor, router: Tensor, up: Tensor, down: Tensor, backend: str) -> Tensor:
        logits = linear(x, router).float()
        chosen = route(logits, None, score="softmax", top_k=top_k, normalize=True, scaling=1.0, backend=backend)
        ids, weights = chosen.expert_ids_RK, chosen.weights_RK
        return expert_feed_forward(x, ids, weights, up, down, activation="swiglu", backend=backend)

    return Problem(inner.shape, (x, router, up, down), run, inner.forward, inner.backward)


def counted_problems() -> Iterator[CountedProblem]:
    """Both activations over 8 experts."""
    for activation in ("swiglu", "squared_relu"):
        problem = experts_problem(bfloat16_inputs(), 256, 128, 8, 64, 2, activation)
        yield CountedProblem(f"moe_{activation}", problem, Goal("of the formula", problem.forward.bytes, 1.3))


def launches() -> Iterator[KernelLaunch]:
    """Every kernel of the experts, for few and many rows an expert."""
    import triton.language as tl

    from kernels.moe import triton_experts as experts
    from kernels.moe import triton_kernels as kernels

    inputs = ("x", "weight", "up", "down", "hidden", "d_y", "left", "right", "rows_SD")
    types = dict.fromkeys((*inputs, "y", "active", "d_hidden", "result"), "*bf16")
    types |= {"order": "*i64", "inverse": "*i64", "offsets": "*i32"}
    types |= {"weights": "*fp32", "d_weights": "*fp32", "choices": "i32", "experts": "i32:16"}
    sizes = ("columns", "inner", "width", "pairs", "model", "lefts", "rights", "tokens")
    types |= dict.fromkeys((*sizes, "weight_expert", "weight_row", "weight_column"), "i32:16")
    for rows, label in ((64, "64 rows an expert"), (1024, "1024 rows an expert")):
        product = {**experts.product_tile(rows * 128, 128), **experts.OPTIONS}
        narrow = {**experts.narrow_tile(rows * 128, 128), **experts.OPTIONS}
        shared = {"DOT": tl.bfloat16, "EXPERTS": 128}
        for strides, way in (({"weight_column": 1}, "down"), ({"weight_row": 1}, "up backward")):
            constants = {"GATHER": False, **shared, **strides}
            kernel = kernels.grouped_product_kernel
            yield kernel_launch(f"experts {way}, {label}", kernel, types, constants, product)
        for swiglu, activation in ((True, "SwiGLU"), (False, "squared ReLU")):
            constants = {"SWIGLU": swiglu, "GATHER": True, **shared}
            name, config = f"experts up, {activation}, {label}", narrow if swiglu else product
            yield kernel_launch(name, kernels.up_kernel, types, constants, config)
            name = f"experts down backward, {activation}, {label}"
            yield kernel_launch(name, kernels.down_backward_kernel, types, constants, narrow)
    for left, name in ((True, "d_down"), (False, "d_up")):
        constants = {"GATHER_LEFT": left, "GATHER_RIGHT": not left, "DOT": tl.bfloat16}
        config = {**experts.OUTER_TILE, **experts.OPTIONS}
        yield kernel_launch(f"experts {name}", kernels.grouped_outer_kernel, types, constants, config)
    yield kernel_launch("experts sum over choices", kernels.sum_choices_kernel, types, {}, experts.SUM_TILE)


def _on_card(inputs: Inputs, sizes: CardSizes) -> Problem:
    return experts_problem(inputs, sizes.tokens, sizes.model, sizes.experts, sizes.expert_width, sizes.top_k)


def _on_host(inputs: Inputs, sizes: HostSizes) -> Problem:
    tokens = sizes.rows * sizes.tokens
    return block_problem(inputs, tokens, sizes.model, sizes.experts, sizes.expert_width, sizes.top_k)


CASE = OperationCase("moe", launches, counted_problems, on_card={"moe": _on_card}, on_host={"moe": _on_host})
