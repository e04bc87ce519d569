"""Products by weights with a recipe of Blackwell: mxfp8 and nvfp4, compared with the emulation as fp8_block is."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from amfm.kernels.cases import (
    CountedProblem,
    GpuSizes,
    Inputs,
    OperationCase,
    Problem,
    Sized,
    bfloat16_inputs,
    formula_goals,
)
from amfm.kernels.low_precision.recipe import RecipeName
from amfm.kernels.moe.low_precision_case import (
    linear_problem,
    low_precision_experts_problem,
)

# Bytes of a number as a code with its part of a scale, and how often a number is read to make it.
MOVED: dict[RecipeName, dict[str, Any]] = {
    "mxfp8": {"code": 1 + 1 / 32, "passes": 1},
    "nvfp4": {"code": 0.5 + 1 / 16, "passes": 2},
}


def counted_problems() -> Iterator[CountedProblem]:
    """A projection whose sizes have whole and broken blocks, by our own kernels."""
    for name, moved in MOVED.items():
        problem = linear_problem(bfloat16_inputs(), 320, 256, 192, name=name, **moved)
        yield CountedProblem(f"{name}_linear", problem, *formula_goals(problem, 1.1))


def trials() -> Iterator[Sized]:
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


def _linear_on_gpu(inputs: Inputs, sizes: GpuSizes, name: RecipeName) -> Problem:
    return linear_problem(inputs, sizes.tokens, sizes.model, 2 * sizes.model, name=name, **MOVED[name])


def _experts_on_gpu(inputs: Inputs, sizes: GpuSizes, name: RecipeName) -> Problem:
    shape = sizes.tokens, sizes.model, sizes.experts, sizes.expert_width, sizes.top_k
    return low_precision_experts_problem(inputs, *shape, name=name, **MOVED[name])


CASE = OperationCase(
    "block_scaled",
    counted_problems,
    trials,
    first_architecture=100,
    on_gpu={f"{name}_linear": partial(_linear_on_gpu, name=name) for name in MOVED}
    | {f"{name}_experts": partial(_experts_on_gpu, name=name) for name in MOVED},
)
