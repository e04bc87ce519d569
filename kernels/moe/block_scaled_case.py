"""Products by weights with a recipe of Blackwell: mxfp8 and nvfp4, compared with the emulation as fp8_block is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from amfm.kernels.cases.operation import KernelLaunch, OperationCase, kernel_launch
from amfm.kernels.cases.problem import (
    CardSizes,
    CountedProblem,
    Inputs,
    Problem,
    bfloat16_inputs,
    formula_goals,
)
from amfm.kernels.cases.trial import Sized
from amfm.kernels.low_precision.recipe import RecipeName
from amfm.kernels.moe.low_precision_case import (
    linear_problem,
    linear_trial,
    low_precision_experts_problem,
    low_precision_experts_trial,
)
from amfm.kernels.swiglu.gate import unit_constants

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


def launches() -> Iterator[KernelLaunch]:
    """Every kernel of both recipes, as 128 experts take them; projections are torch's product and the same quantisers."""
    from amfm.kernels.low_precision import scaled_impl as impl
    from amfm.kernels.low_precision import scaled_kernels as kernels

    types = dict.fromkeys(("x", "y"), "*bf16") | {"weights": "*fp32"}
    codes = ("row_codes", "row_scales", "column_codes", "column_scales", "left_scales", "right_scales")
    types |= dict.fromkeys(codes, "*u8")
    numbers = ("measured", "left_measured", "right_measured", "pairs", "sources", "tiles", "offsets")
    types |= dict.fromkeys(numbers, "*i32") | dict.fromkeys(("experts", "rows", "seed", "column_pieces"), "i32")
    aligned = ("width", "columns", "inner", "lefts", "rights", "stride", "column_stride")
    types |= dict.fromkeys(aligned, "i32:16")

    plain: dict[str, Any] = {
        "ACTIVATED": False,
        "WEIGHTED": False,
        "weights": None,
        "pairs": None,
        **unit_constants(""),
    }
    experts = plain | {"GATHER": True, "TILED": True}
    matrices = plain | {"GATHER": False, "TILED": False, "sources": None, "tiles": None, "offsets": None}
    active = {"GATHER": False, "sources": None, "TILED": True, "ACTIVATED": True, "WEIGHTED": True}
    measure = experts | {"TURN": True, "RANDOM": True}
    yield _launch("nvfp4 largest numbers and bits, experts", kernels.measure_kernel, types, measure, impl.MEASURE)
    for name in MOVED:
        is_fp4, run = name == "nvfp4", 16 if name == "nvfp4" else 32
        both: dict[str, Any] = {
            "ROWS": True,
            "COLUMNS": True,
            "RUN": run,
            "FP4": is_fp4,
            "SQUARE": False,
            "RANDOM": False,
            "TURN": False,
        }
        if not is_fp4:
            both.update(measured=None, offsets=None)
        quantize = partial(_launch, kernel=kernels.quantize_scaled_kernel, types=types, config=impl.QUANTIZE)
        of_gradient = both | {"RANDOM": is_fp4, "TURN": is_fp4}
        yield quantize(f"{name} codes of rows and columns, experts", constants=experts | of_gradient)
        yield quantize(f"{name} codes of weights", constants=matrices | both | {"SQUARE": is_fp4})
        of_rows = both | {"COLUMNS": False, "column_codes": None, "column_scales": None}
        for activation in ("swiglu", "squared_relu"):
            constants = active | unit_constants(activation) | of_rows
            yield quantize(f"{name} codes of activations, {activation}", constants=constants)
        given = types | dict.fromkeys(("left", "right"), "*u8" if is_fp4 else "*fp8e4nv")
        constants = {"TILED": True, "SCATTER": True, "FP4": is_fp4}
        product = _launch(f"{name} product, experts", kernels.scaled_product_kernel, given, constants, impl.PRODUCT)
        yield replace(product, multiplies=True)
        for adds, into, way in ((False, "*bf16", ""), (True, "*fp32", ", added to the sum")):
            constants = {"TILED": True, "ADD": adds, "EXPERTS": 128, "FP4": is_fp4}
            outer = _launch(
                f"{name} outer product, experts{way}",
                kernels.scaled_outer_kernel,
                given | {"result": into},
                constants,
                impl.OUTER,
            )
            yield replace(outer, multiplies=True)


def _launch(
    name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], config: dict[str, int]
) -> KernelLaunch:
    """A launch that Blackwell is the first to take."""
    return replace(kernel_launch(name, kernel, types, constants, config), first_architecture=100)


def trials() -> Iterator[Sized]:
    """Projections with broken blocks, by torch's products on a GPU, and experts of whom some have no rows."""
    for name in MOVED:
        small = partial(low_precision_experts_trial, tokens=150, model=96, experts=5, width=64, chosen=4, name=name)
        yield Sized(f"{name} linear", "first", partial(linear_trial, rows=200, model=192, width=160, name=name))
        yield Sized(f"{name} experts, SwiGLU, an empty one", "first", small)
        yield Sized(f"{name} experts, squared ReLU", "first", partial(small, activation="squared_relu"))
        yield Sized(f"{name} linear, one row", "small", partial(linear_trial, rows=1, model=32, width=96, name=name))
        yield Sized(f"{name} linear, long", "long", partial(linear_trial, rows=8205, model=4096, width=8192, name=name))
        long = partial(
            low_precision_experts_trial, tokens=8205, model=1024, experts=128, width=512, chosen=100, name=name
        )
        yield Sized(f"{name} experts, 28 of 128 empty", "long", long)


def _linear_on_card(inputs: Inputs, sizes: CardSizes, name: RecipeName) -> Problem:
    return linear_problem(inputs, sizes.tokens, sizes.model, 2 * sizes.model, name=name, **MOVED[name])


def _experts_on_card(inputs: Inputs, sizes: CardSizes, name: RecipeName) -> Problem:
    shape = sizes.tokens, sizes.model, sizes.experts, sizes.expert_width, sizes.top_k
    return low_precision_experts_problem(inputs, *shape, name=name, **MOVED[name])


CASE = OperationCase(
    "block_scaled",
    launches,
    counted_problems,
    trials,
    on_card={f"{name}_linear": partial(_linear_on_card, name=name) for name in MOVED}
    | {f"{name}_experts": partial(_experts_on_card, name=name) for name in MOVED},
)
