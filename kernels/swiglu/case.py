"""Activations of feed-forward blocks: SwiGLU of gate and up side by side, and squared ReLU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from amfm.kernels.cases.operation import KernelLaunch, OperationCase, kernel_launch
from amfm.kernels.cases.problem import (
    CardSizes,
    Compute,
    CountedProblem,
    Inputs,
    Minimum,
    Problem,
    bfloat16_inputs,
    find_package,
    formula_goals,
)
from amfm.kernels.cases.trial import Sized, Trial
from amfm.kernels.swiglu.gate import GATES, SWIGLU, Gate
from amfm.kernels.swiglu.op import squared_relu, squared_relu_bytes, swiglu, swiglu_bytes, swiglu_flops

VALUE_BYTES = 2
# Where a tenth of the numbers of trials passes the limit.
LIMITED = GATES["swiglu_oai"]._replace(limit=1.5)


def swiglu_problem(inputs: Inputs, rows: int, width: int) -> Problem:
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

    forward, backward = (
        Minimum(swiglu_bytes(count, VALUE_BYTES, backward=way), swiglu_flops(count, backward=way))
        for way in (False, True)
    )
    return Problem(
        f"{rows}x{width}",
        (inputs.normal(rows, 2 * width),),
        lambda x, backend: swiglu(x, backend=backend),
        forward,
        backward,
        peers,
    )


def squared_relu_problem(inputs: Inputs, rows: int, width: int) -> Problem:
    """max(x, 0)^2."""
    count = rows * width
    forward, backward = (
        Minimum(squared_relu_bytes(count, VALUE_BYTES, backward=way), count * (2 + way)) for way in (False, True)
    )
    return Problem(
        f"{rows}x{width}",
        (inputs.normal(rows, width),),
        lambda x, backend: squared_relu(x, backend=backend),
        forward,
        backward,
    )


def counted_problems() -> Iterator[CountedProblem]:
    """Both, at the same size."""
    for op, build in (("swiglu", swiglu_problem), ("squared_relu", squared_relu_problem)):
        problem = build(bfloat16_inputs(), 256, 512)
        yield CountedProblem(op, problem, *formula_goals(problem, 1.05))


def launches() -> Iterator[KernelLaunch]:
    """All four kernels, SwiGLU's for two units."""
    from amfm.kernels.swiglu import triton_impl as activations

    types = dict.fromkeys(("gate_up", "x", "y", "d_y", "d_x", "d_gate_up"), "*bf16")
    types |= dict.fromkeys(("rows", "columns"), "i32:16")
    tile = {"BLOCK_R": activations.BLOCK_ROWS, "BLOCK_C": activations.BLOCK_COLUMNS}
    for name, unit in (("SwiGLU", SWIGLU), ("limited SwiGLU", LIMITED)):
        constants = tile | unit.constants()
        yield kernel_launch(f"{name} forward", activations.swiglu_forward_kernel, types, constants)
        yield kernel_launch(f"{name} backward", activations.swiglu_backward_kernel, types, constants)
    for name, kernel in (
        ("squared ReLU forward", activations.squared_relu_forward_kernel),
        ("squared ReLU backward", activations.squared_relu_backward_kernel),
    ):
        yield kernel_launch(name, kernel, types, tile)


def trials() -> Iterator[Sized]:
    """SwiGLU and the squared ReLU."""

    def gated(inputs: Inputs, rows: int, width: int, unit: Gate = SWIGLU) -> Trial:
        leaves = {"gate_up": inputs.normal(rows, 2 * width)}
        return Trial(
            leaves, lambda given, backend: {"y": swiglu(given["gate_up"], unit, backend=backend)}, exact="torch"
        )

    def squared(inputs: Inputs, rows: int, width: int) -> Trial:
        leaves = {"x": inputs.normal(rows, width)}
        return Trial(leaves, lambda given, backend: {"y": squared_relu(given["x"], backend=backend)}, exact="torch")

    yield Sized("SwiGLU", "first", partial(gated, rows=33, width=600))
    yield Sized("limited SwiGLU", "first", partial(gated, rows=33, width=600, unit=LIMITED))
    yield Sized("squared ReLU", "first", partial(squared, rows=33, width=600))
    yield Sized("SwiGLU, one row of 7", "small", partial(gated, rows=1, width=7))
    yield Sized("SwiGLU, long", "long", partial(gated, rows=8205, width=12288))
    yield Sized("squared ReLU, long", "long", partial(squared, rows=8205, width=12288))


def _on_card(inputs: Inputs, sizes: CardSizes) -> Problem:
    return swiglu_problem(inputs, sizes.tokens, 2 * sizes.model)


CASE = OperationCase("swiglu", launches, counted_problems, trials, on_card={"swiglu": _on_card})
