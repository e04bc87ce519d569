"""The router's choice: scores, the best k, weights of the chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from amfm.kernels.cases import (
    CountedProblem,
    Inputs,
    Minimum,
    OperationCase,
    Problem,
    Sized,
    bfloat16_inputs,
)
from amfm.kernels.moe.op import route, route_bytes


def router_problem(
    inputs: Inputs, tokens: int, experts: int, top_k: int, *, score: str = "softmax", groups: tuple[int, int] = (1, 1),
    bias: bool = False,
) -> Problem:  # fmt: skip
    """From float32 logits [R, E], the leaf, to weights and scores; the best experts' ids are not compared, ties are."""
    leaves = {"logits": inputs.normal(tokens, experts, scale=3.0, dtype=torch.float32)}
    biases = inputs.normal(experts, scale=0.3, dtype=torch.float32).detach() if bias else None

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        routing = route(
            given["logits"], biases, score=score, top_k=top_k, normalize=True,
            scaling=2.5, num_groups=groups[0], group_top_k=groups[1], backend=backend,
        )  # fmt: skip
        return {"weights": routing.weights_RK, "scores": routing.scores_RE}

    text, forward = f"{tokens}, {experts} experts, top {top_k}", Minimum(route_bytes(tokens, experts, top_k), 0)
    return Problem(leaves, run, text, forward, exact="torch")


def counted_problems() -> Iterator[CountedProblem]:
    """Only forward; no goal is set."""
    yield CountedProblem("moe_route", router_problem(bfloat16_inputs(), 256, 64, 8), has_backward=False)


def trials() -> Iterator[Sized]:
    """Granite's softmax and DeepSeek-V3's sigmoid with bias in groups."""
    yield Sized("softmax, 72 experts", "first", partial(router_problem, tokens=40, experts=72, top_k=10))
    grouped = partial(router_problem, tokens=40, experts=128, top_k=8, score="sigmoid", groups=(8, 4), bias=True)
    yield Sized("sigmoid in groups", "first", grouped)
    yield Sized(
        "sqrt-softplus",
        "first",
        partial(router_problem, tokens=40, experts=96, top_k=6, score="sqrt_softplus", bias=True),
    )
    yield Sized("five experts", "small", partial(router_problem, tokens=1, experts=5, top_k=2))
    yield Sized("softmax, 512 experts", "long", partial(router_problem, tokens=8205, experts=512, top_k=22))


CASE = OperationCase("router", counted_problems, trials)
