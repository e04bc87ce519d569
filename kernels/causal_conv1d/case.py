"""The short causal convolution with SiLU, of width 4 as every published Mamba2 hybrid has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from torch import Tensor

from amfm.kernels.cases.operation import KernelLaunch, OperationCase, kernel_launch
from amfm.kernels.cases.problem import (
    CardSizes,
    Compute,
    CountedProblem,
    HostSizes,
    Inputs,
    Minimum,
    Problem,
    bfloat16_inputs,
    find_package,
    formula_goals,
)
from amfm.kernels.cases.trial import Sized, Trial, documents, slices
from amfm.kernels.causal_conv1d.op import causal_conv1d, convolution_bytes, convolution_flops

WIDTH = 4


def convolution_problem(inputs: Inputs, rows: int, tokens: int, channels: int, text: str = ", SiLU") -> Problem:
    """With bias, without documents.

    Leaves: x [B, T, C], weight [C, 4], bias [C]. The public package takes [B, C, T], which is a view of x.
    """
    leaves = (
        inputs.normal(rows, tokens, channels),
        inputs.normal(channels, WIDTH, scale=0.3),
        inputs.normal(channels),
    )

    def run(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
        return causal_conv1d(x, weight, bias, backend=backend)

    def peers() -> dict[str, Compute]:
        theirs = find_package("causal_conv1d")
        if theirs is None:
            return {}

        def public(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            y: Tensor = theirs.causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu")
            return y.transpose(1, 2)

        return {"causal_conv1d": public}

    forward, backward = (
        Minimum(
            convolution_bytes(rows, tokens, channels, backward=way),
            convolution_flops(rows, tokens, channels, WIDTH, backward=way),
        )
        for way in (False, True)
    )
    return Problem(f"{rows}x{tokens}x{channels}, width {WIDTH}{text}", leaves, run, forward, backward, peers)


def counted_problems() -> Iterator[CountedProblem]:
    """One strip of channels."""
    problem = convolution_problem(bfloat16_inputs(), 1, 512, 128, "")
    yield CountedProblem("causal_conv1d", problem, *formula_goals(problem, 1.1))


def launches() -> Iterator[KernelLaunch]:
    """Both kernels, with documents.

    Inputs are bfloat16; taps, bias and their partial sums are float32.
    """
    from amfm.kernels.causal_conv1d import triton_impl as convolution
    from amfm.kernels.causal_conv1d.triton_kernels import convolution_backward_kernel, convolution_forward_kernel

    types = dict.fromkeys(("x", "y", "d_y", "d_x"), "*bf16") | dict.fromkeys(("weight", "bias", "partial"), "*fp32")
    types |= {"ids": "*i32"} | dict.fromkeys(("T", "C"), "i32:16")
    types |= dict.fromkeys(("stride_b", "stride_t", "stride_dx"), "i32")
    types |= dict.fromkeys(("blocks_per_strip", "strips"), "i32")
    # Strides of a projection with 24 heads are multiples of 8 and not of 16 (`amfm.kernels.common.strides`).
    flags = {"W": WIDTH, "BIAS": True, "DOCUMENTS": True, "UNIT": 8, "SILU": True}
    types |= dict.fromkeys(("window", "d_window"), "*bf16")
    for name, kernel, config, absent in (
        ("forward", convolution_forward_kernel, convolution.FORWARD[0], {"window": None}),
        ("backward", convolution_backward_kernel, convolution.BACKWARD[0], {"window": None, "d_window": None}),
    ):
        whole = flags | {"WINDOW": False} | absent
        for text, special in (
            (f"width {WIDTH}", whole),
            (f"width {WIDTH}, behind a window", flags | {"WINDOW": True}),
            ("width 3 without SiLU", whole | {"W": 3, "BIAS": False, "SILU": False}),
        ):
            yield kernel_launch(f"convolution {name}, {text}", kernel, types, special, config)


def trials() -> Iterator[Sized]:
    """Width 4 as models have it; slices of a wider projection; other widths."""

    def trial(
        inputs: Inputs, rows: int, tokens: int, channels: int, width: int = 4, *, lengths: tuple[int, ...] = (),
        before: int = 0, initial: bool = False, activation: str = "silu", exact: str = "reference",
    ) -> Trial:  # fmt: skip
        x = slices(inputs.normal(rows, tokens, before + channels), before, channels)[1]
        leaves = {"x": x, "weight": inputs.normal(channels, width, scale=0.5), "bias": inputs.normal(channels)}
        if initial:
            leaves["window"] = inputs.normal(rows, width - 1, channels)
        ids = documents(inputs, tokens, *lengths, rows=rows) if lengths else None

        def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
            return {
                "y": causal_conv1d(
                    given["x"], given["weight"], given["bias"], document_ids_BT=ids,
                    initial_window_BWC=given.get("window"), activation=activation, backend=backend,
                )
            }  # fmt: skip

        return Trial(leaves, run, exact=exact)

    yield Sized("with documents", "first", partial(trial, rows=2, tokens=100, channels=136, lengths=(40, 1, 59)))
    yield Sized(
        "width 3 behind a window", "small", partial(trial, rows=2, tokens=40, channels=33, width=3, initial=True)
    )
    bare = partial(trial, rows=2, tokens=50, channels=72, width=3, lengths=(1, 49), activation="none")
    yield Sized("width 3 without SiLU", "small", bare)
    yield Sized("an unaligned slice", "small", partial(trial, rows=1, tokens=35, channels=41, before=7))
    long = partial(trial, rows=1, tokens=8205, lengths=(4000, 1, 4204), exact="torch")
    yield Sized("8448 channels of a projection", "long", partial(long, channels=8448, before=8192))
    yield Sized("1560 channels, unaligned", "long", partial(long, channels=1560, before=1537))


def _on_card(inputs: Inputs, sizes: CardSizes) -> Problem:
    return convolution_problem(inputs, 1, sizes.tokens, sizes.heads * sizes.head_dim + 2 * sizes.state)


def _on_host(inputs: Inputs, sizes: HostSizes) -> Problem:
    return convolution_problem(inputs, sizes.rows, sizes.tokens, sizes.heads * sizes.head_dim + 2 * sizes.state)


CASE = OperationCase(
    "causal_conv1d",
    launches,
    counted_problems,
    trials,
    on_card={"causal_conv1d": _on_card},
    on_host={"causal_conv1d": _on_host},
)
