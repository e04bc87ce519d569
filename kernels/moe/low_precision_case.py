"""Products by weights with a recipe: `linear` and experts of fp8_block, compared with the emulation.

"reference" and "torch" are the emulation here, so that a trial asks whether codes and products are right, not how near
8 bits come to 16: the tests of formulas and of errors ask that (tests/kernels/low_precision).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional

from amfm.kernels.cases.operation import KernelLaunch, OperationCase, kernel_launch
from amfm.kernels.cases.problem import (
    CardSizes,
    Compute,
    CountedProblem,
    Inputs,
    Minimum,
    Problem,
    bfloat16_inputs,
    formula_goals,
)
from amfm.kernels.cases.trial import Sized, Trial
from amfm.kernels.linear.low_precision import low_precision_linear
from amfm.kernels.low_precision.recipe import Recipe, RecipeName
from amfm.kernels.moe.case import experts_problem, experts_trial
from amfm.kernels.moe.low_precision import makes_codes
from amfm.kernels.moe.op import feed_forward_flops
from amfm.kernels.swiglu.gate import unit_constants

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

    def run(x: Tensor, weight: Tensor, backend: str) -> Tensor:
        return low_precision_linear(x, weight, _recipe(backend, name), None)

    def quantised(numbers: int, directions: int) -> float:
        return numbers * (WIDE * passes + code * directions)

    flops = 2 * rows * model * width
    forward = (
        quantised(rows * model, 2) + quantised(model * width, 1) + code * (rows + width) * model + WIDE * rows * width
    )
    backward = quantised(rows * width, 2) + quantised(model * width, 1) + code * (rows + model) * width
    backward += WIDE * rows * model + code * rows * (model + width) + WIDE * model * width
    return Problem(
        f"{rows}x{model}x{width}",
        (inputs.normal(rows, model), inputs.normal(width, model, scale=model**-0.5)),
        run,
        Minimum(int(forward), flops),
        Minimum(int(backward), 2 * flops),
        lambda: {"bfloat16": functional.linear},
    )


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
) -> Problem:
    """`experts_problem` by a recipe; next to it the same in bfloat16 by our kernels. `code`, `passes` as of `linear_problem`."""
    wide = experts_problem(inputs, tokens, model, experts, width, top_k)

    def run(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, backend: str) -> Tensor:
        # Views: leaves stay without a recipe, or the peer would have it too.
        return wide.run(x, weights, *_marked(up, down, backend, name), backend=backend)

    def peers() -> dict[str, Compute]:
        return {"bfloat16": wide.on("triton")}

    pairs, flops = tokens * top_k, feed_forward_flops(tokens * top_k, model, width, "swiglu")
    numbers = 3 * experts * model * width
    # Rows read and written as codes, codes read, hidden rows written and read, activations as codes, results; weights and codes.
    is_made = makes_codes(name, width, "swiglu")  # then hidden rows are not read, nor their gradients but as codes
    rows = model * (WIDE * passes + 2 * code + 2 * WIDE) + width * (
        2 * WIDE * (1 if is_made else passes + 1) + 2 * code
    )
    forward = pairs * rows + numbers * (WIDE * passes + 2 * code)
    backward = 2 * forward + pairs * width * (3 if is_made else 10) * WIDE + numbers * WIDE
    return Problem(wide.shape, wide.leaves, run, Minimum(int(forward), flops), Minimum(int(backward), 2 * flops), peers)


def counted_problems() -> Iterator[CountedProblem]:
    """A projection whose sizes have whole and broken blocks."""
    problem = linear_problem(bfloat16_inputs(), 320, 256, 192)
    yield CountedProblem("low_precision_linear", problem, *formula_goals(problem, 1.1))


def launches() -> Iterator[KernelLaunch]:
    """Every kernel of fp8_block, for projections and for 128 experts."""
    from amfm.kernels.low_precision import triton_impl as codes
    from amfm.kernels.low_precision import triton_kernels as kernels
    from amfm.kernels.moe import triton_codes
    from amfm.kernels.moe import triton_epilogues as epilogues

    types = dict.fromkeys(("x", "weight", "y", "v", "hidden", "d_hidden", "active"), "*bf16")
    scales = ("row_scales", "column_scales", "scales", "transposed_scales", "left_scales", "right_scales")
    types |= dict.fromkeys((*scales, "weights", "d_weights"), "*fp32")
    types |= dict.fromkeys(("row_codes", "column_codes", "codes", "transposed"), "*u8")
    types |= dict.fromkeys(("left", "right"), "*fp8e4nv")
    types |= dict.fromkeys(("pairs", "sources", "tiles", "offsets"), "*i32")
    types |= dict.fromkeys(("rows", "experts"), "i32")
    types |= dict.fromkeys(("width", "columns", "inner", "lefts", "rights"), "i32:16")
    quantize, product, outer = kernels.quantize_tiles_kernel, kernels.fp8_product_kernel, kernels.fp8_outer_kernel
    for tiled, whose in ((False, ""), (True, ", experts")):
        absent: dict[str, Any] = {} if tiled else {"tiles": None, "sources": None}
        constants: dict[str, Any] = {
            "TILED": tiled,
            "GATHER": tiled,
            "ROWS": True,
            "COLUMNS": True,
            "ACTIVATED": False,
            "WEIGHTED": False,
        }
        constants |= absent | {"weights": None, "pairs": None} | unit_constants("")
        yield kernel_launch(f"fp8 codes of rows and columns{whose}", quantize, types, constants, codes.QUANTIZE)
        constants = {"TILED": tiled, "SCATTER": tiled} | absent
        yield _multiplying(kernel_launch(f"fp8 product{whose}", product, types, constants, codes.PRODUCT))
        for adds, into, way in ((False, "*bf16", ""), (True, "*fp32", ", added to the sum")):
            constants = {"TILED": tiled, "ADD": adds, "EXPERTS": 128} | ({} if tiled else {"offsets": None})
            launch = kernel_launch(
                f"fp8 outer product{whose}{way}", outer, types | {"result": into}, constants, codes.OUTER
            )
            yield _multiplying(launch)
    for activation in ("swiglu", "squared_relu"):
        constants = {"TILED": True, "GATHER": False, "ROWS": True, "COLUMNS": False, "WEIGHTED": True}
        constants |= {"ACTIVATED": True, "sources": None, "column_codes": None, "column_scales": None}
        constants |= unit_constants(activation)
        yield kernel_launch(f"fp8 codes of activations, {activation}", quantize, types, constants, codes.QUANTIZE)
        swiglu = unit_constants(activation) | {"WEIGHTED": True, "BLOCK_M": codes.RUN}
        yield kernel_launch(
            f"fp8 experts open, {activation}", triton_codes.open_kernel, types, swiglu, triton_codes.OPEN_TILE
        )
        for saved, way in ((False, ""), (True, ", hidden rows as codes")):
            fused = unit_constants(activation) | {"WEIGHTED": True, "SAVED": saved}
            fused |= {} if saved else {"hidden_scales": None}
            stored = types | dict.fromkeys(("like", "v"), "*bf16") | {"hidden": "*u8" if saved else "*bf16"}
            stored |= dict.fromkeys(("active_codes", "row_codes"), "*u8")
            stored |= dict.fromkeys(("active_scales", "hidden_scales"), "*fp32")
            launch = kernel_launch(
                f"fp8 experts up, {activation}{way}", epilogues.fp8_up_kernel, stored, fused, epilogues.UP
            )
            yield _multiplying(launch)
            yield kernel_launch(
                f"fp8 experts open as codes, {activation}{way}",
                epilogues.fp8_open_kernel,
                stored,
                fused,
                epilogues.OPEN_CODES,
            )
    rows = types | {"packed": "*u8", "bytes_a_row": "i32:16"}
    yield kernel_launch("fp8 packed rows", kernels.pack_rows_kernel, rows, {}, codes.PACK)
    yield kernel_launch("fp8 unpacked rows", kernels.unpack_rows_kernel, rows, {}, codes.PACK)
    for plain, transposed, way in ((True, False, ""), (False, True, ", transposed"), (True, True, ", both ways")):
        constants = {"PLAIN": plain, "TRANSPOSED": transposed}
        yield kernel_launch(
            f"fp8 codes of weights{way}", kernels.quantize_weight_kernel, types, constants, codes.QUANTIZE
        )


def _multiplying(launch: KernelLaunch) -> KernelLaunch:
    """A launch that is checked against wgmma on Hopper, the first to multiply 8 bits."""
    return replace(launch, multiplies=True, first_architecture=90)


def linear_trial(inputs: Inputs, rows: int, model: int, width: int, name: RecipeName = "fp8_block") -> Trial:
    """A projection by a recipe, compared with the emulation."""
    leaves = {"x": inputs.normal(rows, model), "weight": inputs.normal(width, model, scale=model**-0.5)}

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        return {"y": low_precision_linear(given["x"], given["weight"], _recipe(backend, name), None)}

    return Trial(leaves, run, exact="torch")


def low_precision_experts_trial(inputs: Inputs, name: RecipeName = "fp8_block", **sizes: Any) -> Trial:
    """Experts by a recipe, compared with the emulation."""
    wide = experts_trial(inputs, **sizes, top_k=2, exact="torch")

    def run(given: Mapping[str, Tensor], backend: str) -> Mapping[str, Tensor]:
        up, down = _marked(given["up"], given["down"], backend, name)
        return wide.run({**given, "up": up, "down": down}, backend)

    return replace(wide, run=run)


def trials() -> Iterator[Sized]:
    """Projections with broken blocks, and experts of whom some have no rows."""
    small = partial(low_precision_experts_trial, tokens=150, model=80, experts=5, width=48, chosen=4)
    yield Sized("fp8 linear", "first", partial(linear_trial, rows=200, model=192, width=144))
    yield Sized("fp8 experts, SwiGLU, an empty one", "first", small)
    yield Sized("fp8 experts, squared ReLU", "first", partial(small, activation="squared_relu"))
    yield Sized("fp8 linear, one row", "small", partial(linear_trial, rows=1, model=16, width=48))
    yield Sized("fp8 linear, long", "long", partial(linear_trial, rows=8205, model=4096, width=8192))
    long = partial(low_precision_experts_trial, tokens=8205, model=1024, experts=128, width=512, chosen=100)
    yield Sized("fp8 experts, 28 of 128 empty", "long", long)


def _marked(up: Tensor, down: Tensor, backend: str, name: RecipeName = "fp8_block") -> tuple[Tensor, Tensor]:
    """Views of experts' weights with the recipe."""
    views = up.view_as(up), down.view_as(down)
    for view in views:
        view.recipe = _recipe(backend, name)  # type: ignore[attr-defined]
    return views


def _linear_on_card(inputs: Inputs, sizes: CardSizes) -> Problem:
    return linear_problem(inputs, sizes.tokens, sizes.model, 2 * sizes.model)


def _experts_on_card(inputs: Inputs, sizes: CardSizes) -> Problem:
    return low_precision_experts_problem(
        inputs, sizes.tokens, sizes.model, sizes.experts, sizes.expert_width, sizes.top_k
    )


CASE = OperationCase(
    "low_precision",
    launches,
    counted_problems,
    trials,
    on_card={"low_precision_linear": _linear_on_card, "low_precision_experts": _experts_on_card},
)
