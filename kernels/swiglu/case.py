"""Activations of feed-forward blocks: SwiGLU of gate and up next to each other, and units of one matrix."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

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
    each_pass,
    find_package,
    formula_goals,
)
from amfm.kernels.swiglu.gate import GATES, SWIGLU, Gate
from amfm.kernels.swiglu.op import plain_unit, squared_relu_bytes, swiglu, swiglu_bytes, swiglu_flops

VALUE_BYTES = 2
# Where a tenth of the numbers of trials passes the limit.
LIMITED = GATES["swiglu_oai"]._replace(limit=1.5)


def swiglu_problem(inputs: Inputs, rows: int, width: int, unit: Gate = SWIGLU) -> Problem:
    """silu(gate) * up, both of `width`.

    The leaf holds gate, then up: [R, 2 width]. The peer takes two tensors, which its call has to copy apart.
    """
    count = rows * width

    def peers() -> dict[str, Compute]:
        theirs = find_package("liger_kernel.ops.swiglu")
        if theirs is None:
            return {}

        def liger(x: Tensor) -> Tensor:
            return theirs.LigerSiLUMulFunction.apply(*(half.contiguous() for half in x.chunk(2, dim=-1)))

        return {"liger_kernel": liger}

    return Problem(
        {"gate_up": inputs.normal(rows, 2 * width)},
        lambda given, backend: {"y": swiglu(given["gate_up"], unit, backend=backend)},
        f"{rows}x{width}",
        *each_pass(
            lambda back: Minimum(swiglu_bytes(count, VALUE_BYTES, backward=back), swiglu_flops(count, backward=back))
        ),
        peers,
        exact="torch",
    )


def plain_problem(inputs: Inputs, rows: int, width: int, activation: str = "squared_relu") -> Problem:
    """max(x, 0)^2, or GELU."""
    count = rows * width
    return Problem(
        {"x": inputs.normal(rows, width)},
        lambda given, backend: {"y": plain_unit(given["x"], activation, backend=backend)},
        f"{rows}x{width}",
        *each_pass(lambda back: Minimum(squared_relu_bytes(count, VALUE_BYTES, backward=back), count * (2 + back))),
        exact="torch",
    )


def counted_problems() -> Iterator[CountedProblem]:
    """Both, at the same size."""
    for op, build in (("swiglu", swiglu_problem), ("squared_relu", plain_problem)):
        problem = build(bfloat16_inputs(), 256, 512)
        yield CountedProblem(op, problem, *formula_goals(problem, 1.05))


def trials() -> Iterator[Sized]:
    """Gated units, the squared ReLU and GELU."""
    yield Sized("SwiGLU", "first", partial(swiglu_problem, rows=33, width=600))
    yield Sized("limited SwiGLU", "first", partial(swiglu_problem, rows=33, width=600, unit=LIMITED))
    yield Sized("GEGLU", "first", partial(swiglu_problem, rows=33, width=600, unit=GATES["geglu"]))
    yield Sized("exact GEGLU", "first", partial(swiglu_problem, rows=33, width=600, unit=GATES["geglu_erf"]))
    for activation in ("gelu", "gelu_tanh"):
        yield Sized(activation, "first", partial(plain_problem, rows=33, width=600, activation=activation))
    yield Sized("squared ReLU", "first", partial(plain_problem, rows=33, width=600))
    yield Sized("SwiGLU, one row of 7", "small", partial(swiglu_problem, rows=1, width=7))
    yield Sized("SwiGLU, long", "long", partial(swiglu_problem, rows=8205, width=12288))
    yield Sized("squared ReLU, long", "long", partial(plain_problem, rows=8205, width=12288))


def _on_gpu(inputs: Inputs, sizes: GpuSizes) -> Problem:
    return swiglu_problem(inputs, sizes.tokens, 2 * sizes.model)


CASE = OperationCase("swiglu", counted_problems, trials, on_gpu={"swiglu": _on_gpu})
