"""The short causal convolution with SiLU, of width 4 as every published Mamba2 hybrid has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from torch import Tensor

from amfm.kernels.cases import (
    Compute,
    CountedProblem,
    GpuSizes,
    HostSizes,
    Inputs,
    Minimum,
    OperationCase,
    Problem,
    Sized,
    bfloat16_inputs,
    documents,
    each_pass,
    find_package,
    formula_goals,
    slices,
)
from amfm.kernels.causal_conv1d.op import causal_conv1d, convolution_bytes, convolution_flops


def convolution_problem(
    inputs: Inputs, rows: int, tokens: int, channels: int, text: str = ", SiLU", *, width: int = 4,
    lengths: tuple[int, ...] = (), before: int = 0, initial: bool = False, activation: str = "silu", exact: str = "reference",
) -> Problem:  # fmt: skip
    """With bias; `before`: channels of a projection that stand before its own.

    Leaves: x [B, T, C], weight [C, width], bias [C], a window [B, width - 1, C] where `initial`. The public package takes
    [B, C, T], which is a view of x.
    """
    x = slices(inputs.normal(rows, tokens, before + channels), before, channels)[1]
    leaves = {"x": x, "weight": inputs.normal(channels, width, scale=0.5), "bias": inputs.normal(channels)}
    if initial:
        leaves["window"] = inputs.normal(rows, width - 1, channels)
    ids = documents(inputs, tokens, *lengths, rows=rows) if lengths else None

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        x, weight, bias, *rest = given.values()
        window = rest[0] if rest else None
        settings = {"initial_window_BWC": window, "activation": activation, "backend": backend}
        return {"y": causal_conv1d(x, weight, bias, document_ids_BT=ids, **settings)}  # type: ignore[arg-type]

    def peers() -> dict[str, Compute]:
        theirs = find_package("causal_conv1d")
        if theirs is None:
            return {}

        def public(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            y: Tensor = theirs.causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu")
            return y.transpose(1, 2)

        return {"causal_conv1d": public}

    shape = rows, tokens, channels
    least = each_pass(
        lambda back: Minimum(convolution_bytes(*shape, backward=back), convolution_flops(*shape, width, backward=back))
    )
    return Problem(leaves, run, f"{rows}x{tokens}x{channels}, width {width}{text}", *least, peers, exact=exact)


def counted_problems() -> Iterator[CountedProblem]:
    """One strip of channels."""
    problem = convolution_problem(bfloat16_inputs(), 1, 512, 128, "")
    yield CountedProblem("causal_conv1d", problem, *formula_goals(problem, 1.1))


def trials() -> Iterator[Sized]:
    """Width 4 as models have it; slices of a wider projection; other widths."""
    yield Sized(
        "with documents", "first", partial(convolution_problem, rows=2, tokens=100, channels=136, lengths=(40, 1, 59))
    )
    yield Sized(
        "width 3 behind a window",
        "small",
        partial(convolution_problem, rows=2, tokens=40, channels=33, width=3, initial=True),
    )
    bare = partial(convolution_problem, rows=2, tokens=50, channels=72, width=3, lengths=(1, 49), activation="none")
    yield Sized("width 3 without SiLU", "small", bare)
    yield Sized("an unaligned slice", "small", partial(convolution_problem, rows=1, tokens=35, channels=41, before=7))
    long = partial(convolution_problem, rows=1, tokens=8205, lengths=(4000, 1, 4204), exact="torch")
    yield Sized("8448 channels of a projection", "long", partial(long, channels=8448, before=8192))
    yield Sized("1560 channels, unaligned", "long", partial(long, channels=1560, before=1537))


def _on_gpu(inputs: Inputs, sizes: GpuSizes) -> Problem:
    return convolution_problem(inputs, 1, sizes.tokens, sizes.heads * sizes.head_dim + 2 * sizes.state)


def _on_host(inputs: Inputs, sizes: HostSizes) -> Problem:
    return convolution_problem(inputs, sizes.rows, sizes.tokens, sizes.heads * sizes.head_dim + 2 * sizes.state)


CASE = OperationCase(
    "causal_conv1d",
    counted_problems,
    trials,
    on_gpu={"causal_conv1d": _on_gpu},
    on_host={"causal_conv1d": _on_host},
)
