"""Products by weights with a recipe, compared with the emulation: fp8_block, and Blackwell's mxfp8 and nvfp4.

"reference" and "torch" are the emulation here, so that a trial asks whether codes and products are right, not how near
8 bits come to 16: the tests of formulas and of errors ask that (tests/kernels/low_precision).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from amfm.kernels.cases import (
    Compute,
    CountedProblem,
    GpuSizes,
    Inputs,
    Minimum,
    OperationCase,
    Problem,
    Sized,
    bfloat16_inputs,
    formula_goals,
)
from amfm.kernels.linear.activated import activated_linear
from amfm.kernels.linear.op import low_precision_linear
from amfm.kernels.low_precision.library_products import takes_codes
from amfm.kernels.low_precision.recipe import Recipe, RecipeName
from amfm.kernels.moe.case import experts_problem
from amfm.kernels.moe.low_precision import makes_codes
from amfm.kernels.moe.op import feed_forward_flops
from amfm.kernels.runtime.product_backend import product_backend
from amfm.kernels.swiglu.op import squared_relu

# Of a number: as bfloat16, as a code with its part of a scale.
WIDE, CODE = 2.0, 1 + 4 / 128


def _recipe(backend: str, name: RecipeName = "fp8_block") -> Recipe:
    return Recipe(name, emulate=backend != "triton", seed=7)


def linear_problem(
    inputs: Inputs,
    rows: int,
    model: int,
    width: int,
    *,
    name: RecipeName = "fp8_block",
    code: float = CODE,
    passes: int = 1,
) -> Problem:
    """x W^T of x [R, model], W [width, model]; next to it the same in bfloat16.

    Least bytes: x is read and written as codes of rows and columns, W as codes, these read once by each product. `code`: bytes
    of a number as a code; `passes`: how often one is read to make it.
    """

    leaves = {"x": inputs.normal(rows, model), "weight": inputs.normal(width, model, scale=model**-0.5)}

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        return {"y": low_precision_linear(given["x"], given["weight"], _recipe(backend, name), None)}

    def quantised(numbers: int, directions: int) -> float:
        return numbers * (WIDE * passes + code * directions)

    flops = 2 * rows * model * width
    forward = (
        quantised(rows * model, 2) + quantised(model * width, 1) + code * (rows + width) * model + WIDE * rows * width
    )
    backward = quantised(rows * width, 2) + quantised(model * width, 1) + code * (rows + model) * width
    backward += WIDE * rows * model + code * rows * (model + width) + WIDE * model * width
    least = Minimum(int(forward), flops), Minimum(int(backward), 2 * flops)

    def peers() -> dict[str, Compute]:
        found: dict[str, Compute] = {"bfloat16": functional.linear}
        if name == "fp8_block" and takes_codes(inputs.device):
            found["cublaslt"] = _ByLibrary.apply
        return found

    return Problem(leaves, run, f"{rows}x{model}x{width}", *least, peers, exact="torch")


class _ByLibrary(torch.autograd.Function):
    """The projection by fp8_block, all three products by torch, whatever the process is told."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        with torch.enable_grad(), product_backend("torch"):
            ctx.leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
            ctx.y = low_precision_linear(ctx.leaves[0], ctx.leaves[1], _recipe("triton"), None)
        y: Tensor = ctx.y.detach()
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        with product_backend("torch"):
            return torch.autograd.grad(ctx.y, ctx.leaves, dy, retain_graph=True)


def low_precision_experts_problem(
    inputs: Inputs,
    tokens: int,
    model: int,
    experts: int,
    width: int,
    top_k: int,
    *,
    name: RecipeName = "fp8_block",
    code: float = CODE,
    passes: int = 1,
    chosen: int | None = None,
    activation: str = "swiglu",
) -> Problem:
    """`experts_problem` by a recipe; next to it the same in bfloat16 by our kernels. `code`, `passes` as of `linear_problem`."""
    wide = experts_problem(inputs, tokens, model, experts, width, top_k, activation, chosen=chosen)

    def run(given: Mapping[str, Tensor], backend: str) -> Mapping[str, Tensor]:
        # Views: leaves stay without a recipe, or the peer would have it too.
        views = {part: given[part].view_as(given[part]) for part in ("up", "down")}
        for view in views.values():
            view.recipe = _recipe(backend, name)  # type: ignore[attr-defined]
        return wide.run({**given, **views}, backend)

    def peers() -> dict[str, Compute]:
        return {"bfloat16": wide.on("triton")}

    pairs, flops = tokens * top_k, feed_forward_flops(tokens * top_k, model, width, activation)
    numbers = 3 * experts * model * width
    # Rows read and written as codes, codes read, hidden rows written and read, activations as codes, results; weights and codes.
    is_made = makes_codes(name, width, activation)  # then hidden rows are not read, nor their gradients but as codes
    rows = model * (WIDE * passes + 2 * code + 2 * WIDE) + width * (
        2 * WIDE * (1 if is_made else passes + 1) + 2 * code
    )
    forward = pairs * rows + numbers * (WIDE * passes + 2 * code)
    backward = 2 * forward + pairs * width * (3 if is_made else 10) * WIDE + numbers * WIDE
    least = Minimum(int(forward), flops), Minimum(int(backward), 2 * flops)
    return Problem(wide.leaves, run, wide.shape, *least, peers, exact="torch")


def counted_problems() -> Iterator[CountedProblem]:
    """A projection whose sizes have whole and broken blocks."""
    problem = linear_problem(bfloat16_inputs(), 320, 256, 192)
    yield CountedProblem("low_precision_linear", problem, *formula_goals(problem, 1.1))


def activated_problem(inputs: Inputs, rows: int, width: int, model: int) -> Problem:
    """The second half of a feed-forward that keeps its hidden rows as codes."""
    leaves = {"hidden": inputs.normal(rows, width), "weight": inputs.normal(model, width, scale=width**-0.5)}

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        weight = given["weight"].view_as(given["weight"])
        weight.recipe = replace(_recipe(backend), saved="fp8")  # type: ignore[attr-defined]
        return {"y": activated_linear(given["hidden"], weight, partial(squared_relu, backend=backend), backend=backend)}

    return Problem(leaves, run, exact="torch")


def trials() -> Iterator[Sized]:
    """Projections with broken blocks, and experts of whom some have no rows."""
    small = partial(low_precision_experts_problem, top_k=2, tokens=150, model=80, experts=5, width=48, chosen=4)
    yield Sized("fp8 linear", "first", partial(linear_problem, rows=200, model=192, width=144))
    yield Sized("fp8 linear, hidden rows as codes", "first", partial(activated_problem, rows=130, width=192, model=144))
    yield Sized("fp8 experts, SwiGLU, an empty one", "first", small)
    yield Sized("fp8 experts, squared ReLU", "first", partial(small, activation="squared_relu"))
    yield Sized("fp8 linear, one row", "small", partial(linear_problem, rows=1, model=16, width=48))
    yield Sized("fp8 linear, long", "long", partial(linear_problem, rows=8205, model=4096, width=8192))
    long = partial(low_precision_experts_problem, top_k=2, tokens=8205, model=1024, experts=128, width=512, chosen=100)
    yield Sized("fp8 experts, 28 of 128 empty", "long", long)


def _linear_on_gpu(inputs: Inputs, sizes: GpuSizes) -> Problem:
    return linear_problem(inputs, sizes.tokens, sizes.model, 2 * sizes.model)


def _experts_on_gpu(inputs: Inputs, sizes: GpuSizes) -> Problem:
    return low_precision_experts_problem(
        inputs, sizes.tokens, sizes.model, sizes.experts, sizes.expert_width, sizes.top_k
    )


CASE = OperationCase(
    "low_precision",
    counted_problems,
    trials,
    first_architecture=90,
    on_gpu={"low_precision_linear": _linear_on_gpu, "low_precision_experts": _experts_on_gpu},
)


# Bytes of a number as a code with its part of a scale, and how often a number is read to make it.
MOVED: dict[RecipeName, dict[str, Any]] = {
    "mxfp8": {"code": 1 + 1 / 32, "passes": 1},
    "nvfp4": {"code": 0.5 + 1 / 16, "passes": 2},
}


def counted_block_scaled() -> Iterator[CountedProblem]:
    """A projection whose sizes have whole and broken blocks, by our own kernels."""
    for name, moved in MOVED.items():
        problem = linear_problem(bfloat16_inputs(), 320, 256, 192, name=name, **moved)
        yield CountedProblem(f"{name}_linear", problem, *formula_goals(problem, 1.1))


def block_scaled_trials() -> Iterator[Sized]:
    """Projections with broken blocks, by torch's products on a GPU, and experts of whom some have no rows."""
    for name in MOVED:
        small = partial(
            low_precision_experts_problem, top_k=2, tokens=150, model=96, experts=5, width=64, chosen=4, name=name
        )
        yield Sized(f"{name} linear", "first", partial(linear_problem, rows=200, model=192, width=160, name=name))
        yield Sized(f"{name} experts, SwiGLU, an empty one", "first", small)
        yield Sized(f"{name} experts, squared ReLU", "first", partial(small, activation="squared_relu"))
        yield Sized(f"{name} linear, one row", "small", partial(linear_problem, rows=1, model=32, width=96, name=name))
        yield Sized(
            f"{name} linear, long", "long", partial(linear_problem, rows=8205, model=4096, width=8192, name=name)
        )
        long = partial(
            low_precision_experts_problem,
            top_k=2,
            tokens=8205,
            model=1024,
            experts=128,
            width=512,
            chosen=100,
            name=name,
        )
        yield Sized(f"{name} experts, 28 of 128 empty", "long", long)


def _block_scaled_linear_on_gpu(inputs: Inputs, sizes: GpuSizes, name: RecipeName) -> Problem:
    return linear_problem(inputs, sizes.tokens, sizes.model, 2 * sizes.model, name=name, **MOVED[name])


def _block_scaled_experts_on_gpu(inputs: Inputs, sizes: GpuSizes, name: RecipeName) -> Problem:
    shape = sizes.tokens, sizes.model, sizes.experts, sizes.expert_width, sizes.top_k
    return low_precision_experts_problem(inputs, *shape, name=name, **MOVED[name])


BLOCK_SCALED_CASE = OperationCase(
    "block_scaled",
    counted_block_scaled,
    block_scaled_trials,
    first_architecture=100,
    on_gpu={f"{name}_linear": partial(_block_scaled_linear_on_gpu, name=name) for name in MOVED}
    | {f"{name}_experts": partial(_block_scaled_experts_on_gpu, name=name) for name in MOVED},
)
