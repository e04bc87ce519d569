"""The head: logits, loss and both gradients in one forward pass, without the logits in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from amfm.kernels.cases import (
    NOTHING,
    Compute,
    CountedProblem,
    Goal,
    GpuSizes,
    HostSizes,
    Inputs,
    Minimum,
    OperationCase,
    Problem,
    Sized,
    bfloat16_inputs,
    find_package,
)
from amfm.kernels.linear_cross_entropy.op import (
    cross_entropy_bytes,
    cross_entropy_flops,
    linear_cross_entropy,
    linear_statistics,
)

VALUE_BYTES = 2


def head_problem(
    inputs: Inputs, rows: int, model: int, vocabulary: int, *, ignores: bool = False, exact: str = "reference"
) -> Problem:
    """The mean loss of `rows` tokens, or with `ignores` the sum over four in five of them, with a loss of the logits' size.

    Leaves: hidden [R, D] and weight [V, D], scaled so that logits stay near 1. Gradients are made in forward, so its minimum
    holds both; the backward pass only scales, so its minimum is nothing.
    """
    labels = torch.randint(0, vocabulary, (rows,), device=inputs.device)
    if ignores:
        labels[::5] = -100

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        hidden, weight = given.values()
        loss = linear_cross_entropy(hidden, weight, labels, z_loss_weight=1e-3 * ignores, backend=backend)
        return {"total": loss.total, "token losses": loss.token_nll_R} if ignores else {"mean": loss.total / rows}

    def peers() -> dict[str, Compute]:
        theirs = find_package("liger_kernel.transformers")
        if theirs is None:
            return {}
        loss = theirs.LigerFusedLinearCrossEntropyLoss(reduction="mean")
        return {"liger_kernel": lambda hidden, weight: loss(weight, hidden, labels)}

    forward = Minimum(
        cross_entropy_bytes(rows, vocabulary, model, VALUE_BYTES),
        cross_entropy_flops(rows, vocabulary, model, recompute=False),
    )
    text = f"{rows}x{model}x{vocabulary}"
    return Problem(_leaves(inputs, rows, model, vocabulary), run, text, forward, NOTHING, peers, labels, exact=exact)


def share_problem(inputs: Inputs, rows: int, model: int, vocabulary: int) -> Problem:
    """Statistics of a tensor rank's share of the vocabulary."""
    labels = torch.randint(0, 2 * vocabulary, (rows,), device=inputs.device)

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        hidden, weight = given.values()
        log_sum, target = linear_statistics(hidden, weight, labels, first_row=vocabulary // 2, backend=backend)
        return {"log sums": log_sum, "targets": target}

    return Problem(_leaves(inputs, rows, model, vocabulary), run, exact="torch")


def _leaves(inputs: Inputs, rows: int, model: int, vocabulary: int) -> dict[str, Tensor]:
    return {"hidden": inputs.normal(rows, model), "weight": inputs.normal(vocabulary, model, scale=model**-0.5)}


def counted_problems() -> Iterator[CountedProblem]:
    """One slice of logits."""
    rows, model, vocabulary = 128, 128, 512
    problem = head_problem(bfloat16_inputs(), rows, model, vocabulary)
    # Each of the two products of a slice reads the logits' gradient and the weight or hidden, and writes its result.
    moved = 2 * VALUE_BYTES * (rows * vocabulary + vocabulary * model + rows * model)
    yield CountedProblem(
        "linear_cross_entropy",
        problem,
        Goal("reads of each float32 logit", 4 * rows * vocabulary, 2, argument="logits"),
        has_backward=False,
        library=Minimum(moved, 4 * rows * vocabulary * model),
    )


def trials() -> Iterator[Sized]:
    """The loss with ignored rows, whole and as a tensor rank's share of the vocabulary."""
    whole = partial(head_problem, ignores=True)
    yield Sized("ignored rows", "first", partial(whole, rows=100, model=96, vocabulary=260))
    yield Sized("a share of the vocabulary", "first", partial(share_problem, rows=100, model=96, vocabulary=260))
    yield Sized("uneven sizes", "small", partial(whole, rows=63, model=12, vocabulary=101))
    yield Sized("100352 tokens", "long", partial(whole, rows=2051, model=2048, vocabulary=100352, exact="torch"))
    yield Sized("a share of 50176", "long", partial(share_problem, rows=2051, model=2048, vocabulary=50176))


def _on_gpu(inputs: Inputs, sizes: GpuSizes) -> Problem:
    return head_problem(inputs, sizes.tokens // 2, sizes.model, sizes.vocabulary)


def _on_host(inputs: Inputs, sizes: HostSizes) -> Problem:
    return head_problem(inputs, sizes.rows * sizes.tokens, sizes.model, sizes.vocabulary)


CASE = OperationCase(
    "linear_cross_entropy",
    counted_problems,
    trials,
    on_gpu={"linear_cross_entropy": _on_gpu},
    on_host={"linear_cross_entropy": _on_host},
)
