"""The router's choice: scores, the best k, weights of the chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from amfm.kernels.cases.operation import KernelLaunch, OperationCase, kernel_launch
from amfm.kernels.cases.problem import NOTHING, CountedProblem, Inputs, Minimum, Problem, bfloat16_inputs
from amfm.kernels.cases.trial import Sized, Trial
from amfm.kernels.moe.op import route, route_bytes


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
    """Both kernels as Granite routes (softmax), as DeepSeek-V3 does (sigmoid with bias, in groups), and by sqrt-softplus."""
    import triton

    from amfm.kernels.moe import triton_router as router

    floats = ("logits", "bias", "scores", "weights", "d_weights", "d_scores", "d_logits")
    types = dict.fromkeys(floats, "*fp32") | {"expert_ids": "*i64", "counts": "*i32", "scaling": "fp32"}
    types |= dict.fromkeys(("rows", "experts", "group_size"), "i32:16")
    types |= dict.fromkeys(("num_groups", "group_top_k", "top_k"), "i32")
    routers = (
        ("Granite, 64", "softmax", 1, 64, 10),
        ("grouped, 256", "sigmoid", 8, 32, 8),
        ("sqrt-softplus, 256", "sqrt_softplus", 1, 256, 6),
    )
    for label, score, groups, size, top_k in routers:
        width, choices = groups * size, triton.next_power_of_2(top_k)
        block = {"BLOCK": router.rows_of_block(width), "CHOICES": choices, "SCORE": score, "NORMALIZE": True}
        forward = {"BIAS": score == "sigmoid", "LIMIT": groups > 1, "MERIT": 2, "GROUPS": groups, "SIZE": size, **block}
        yield kernel_launch(f"router forward, {label}", router.route_forward_kernel, types, forward)
        backward = {"EXPERTS": width, **block}
        yield kernel_launch(f"router backward, {label}", router.route_backward_kernel, types, backward)


def trials() -> Iterator[Sized]:
    """Granite's softmax and DeepSeek-V3's sigmoid with bias in groups; the best experts' ids are not compared, ties are."""

    def trial(
        inputs: Inputs,
        tokens: int,
        experts: int,
        top_k: int,
        *,
        score: str = "softmax",
        groups: tuple[int, int] = (1, 1),
        bias: bool = False,
    ) -> Trial:
        leaves = {"logits": inputs.normal(tokens, experts, scale=3.0, dtype=torch.float32)}
        biases = inputs.normal(experts, scale=0.3, dtype=torch.float32).detach() if bias else None

        def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
            routing = route(
                given["logits"], biases, score=score, top_k=top_k, normalize=True,
                scaling=2.5, num_groups=groups[0], group_top_k=groups[1], backend=backend,
            )  # fmt: skip
            return {"weights": routing.weights_RK, "scores": routing.scores_RE}

        return Trial(leaves, run, exact="torch")

    yield Sized("softmax, 72 experts", "first", partial(trial, tokens=40, experts=72, top_k=10))
    grouped = partial(trial, tokens=40, experts=128, top_k=8, score="sigmoid", groups=(8, 4), bias=True)
    yield Sized("sigmoid in groups", "first", grouped)
    yield Sized(
        "sqrt-softplus", "first", partial(trial, tokens=40, experts=96, top_k=6, score="sqrt_softplus", bias=True)
    )
    yield Sized("five experts", "small", partial(trial, tokens=1, experts=5, top_k=2))
    yield Sized("softmax, 512 experts", "long", partial(trial, tokens=8205, experts=512, top_k=22))


CASE = OperationCase("router", launches, counted_problems, trials)
