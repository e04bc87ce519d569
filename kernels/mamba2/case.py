"""Mamba2's mixer from its first projection to its output: the operation that holds convolution, scan and gated norm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from amfm.kernels.cases.operation import KernelLaunch, OperationCase, kernel_launch
from amfm.kernels.cases.problem import (
    EPSILON,
    CardSizes,
    Compute,
    CountedProblem,
    Goal,
    Inputs,
    Minimum,
    Problem,
    bfloat16_inputs,
    find_package,
)
from amfm.kernels.cases.trial import Sized, Trial, documents
from amfm.kernels.common.documents import first_tokens
from amfm.kernels.decay_scan.case import HEAD_DIM, STATE_SIZE
from amfm.kernels.decay_scan.op import scan_flops
from amfm.kernels.mamba2.exchange import SegmentsInOrder
from amfm.kernels.mamba2.op import MixerSizes, mamba2_mix, mixer_bytes

WIDTH = 4
# Sums over all tokens: a head's gradients are judged by the size of what they sum.
SUMS = {"A_log": "dt", "dt_bias": "dt"}


def mixer_problem(
    inputs: Inputs, tokens: int, model: int, sizes: MixerSizes, chunk: int, keep: bool = False
) -> Problem:
    """One row through the mixer, the product with the output's weight among it; products of libraries are not in the minima.

    Leaves: projected [1, T, X], conv weight and bias, A_log, D, the bias of dt (float32), norm weight, out weight.
    """
    H = sizes.heads
    leaves = (
        inputs.normal(1, tokens, sum(sizes.parts())),
        inputs.normal(sizes.channels, WIDTH, scale=0.5),
        inputs.normal(sizes.channels, scale=0.1),
        *(inputs.uniform(H, low=low) for low in (0.0, 1.0, -1.0)),
        inputs.normal(sizes.inner),
        inputs.normal(model, sizes.inner, scale=sizes.inner**-0.5),
    )

    def run(
        projected: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor,
        A_log: Tensor,
        D: Tensor,
        bias: Tensor,
        norm: Tensor,
        out: Tensor,
        backend: str,
    ) -> Tensor:
        settings = {"chunk_size": chunk, "keep_states": keep, "backend": backend}
        weights = (conv_weight, conv_bias, A_log, D, bias, norm, out)
        return mamba2_mix(projected, *weights, sizes, **settings)  # type: ignore[arg-type]

    def peers() -> dict[str, Compute]:
        theirs = find_package("mamba_ssm.ops.triton.ssd_combined")
        if theirs is None:
            return {}

        def mamba_ssm(
            projected: Tensor,
            conv_weight: Tensor,
            conv_bias: Tensor,
            A_log: Tensor,
            D: Tensor,
            bias: Tensor,
            norm: Tensor,
            out: Tensor,
        ) -> Tensor:
            return theirs.mamba_split_conv1d_scan_combined(
                projected, conv_weight, conv_bias, bias, -A_log.exp(), D=D, chunk_size=256, activation="silu",
                rmsnorm_weight=norm, rmsnorm_eps=EPSILON, outproj_weight=out, headdim=sizes.head_dim, ngroups=sizes.groups,
                norm_before_gate=False,
            )  # fmt: skip

        return {"mamba_ssm": mamba_ssm}

    shape = (1, tokens, H, sizes.groups, sizes.state, sizes.head_dim)
    forward, backward = (
        Minimum(mixer_bytes(1, tokens, sizes, backward=way), scan_flops(*shape, chunk_size=chunk, backward=way))
        for way in (False, True)
    )
    text = f"1x{tokens}, {H} heads x {sizes.head_dim}, {sizes.groups} groups, state {sizes.state}, chunks of {chunk}"
    return Problem(text, leaves, run, forward, backward, peers)


def counted_problems() -> Iterator[CountedProblem]:
    """Two policies; the library's products are left out, which no counter of kernels sees."""
    sizes = MixerSizes(8, HEAD_DIM, 1, STATE_SIZE, 1, EPSILON)
    for keep in (True, False):
        problem = mixer_problem(bfloat16_inputs(), 512, 64, sizes, 128, keep)
        yield CountedProblem(
            "mamba2" if keep else "mamba2_states_again",
            problem,
            Goal("of the formula", problem.forward.bytes, 1.25 if keep else 1.15),
            Goal("of the formula", problem.backward.bytes, 1.75 if keep else 2.0),
        )


def launches() -> Iterator[KernelLaunch]:
    """What the parts do not compile: walks and gradients of the scan with raw gates, and sums of parts."""
    import triton.language as tl

    from amfm.kernels.common.partial_sums import sum_parts_kernel
    from amfm.kernels.decay_scan import launch as scan
    from amfm.kernels.decay_scan.triton_backward import gradients_kernel, walk_back_kernel
    from amfm.kernels.decay_scan.triton_forward import chunk_state_kernel

    halves = (
        "q", "k", "v", "y", "d_y", "d_v", "d_q", "d_k", "entering", "leaving", "g", "d_g", "A_log", "bias", "skip",
    )  # fmt: skip
    states = ("initial", "final", "decay", "d_initial", "d_final", "d_heads")
    types = dict.fromkeys(halves, "*bf16") | dict.fromkeys(states, "*fp32")
    types |= {"firsts": "*i32"}
    strides = ("stride_qb", "stride_qt", "stride_kb", "stride_kt", "stride_vb", "stride_vt", "stride_dq", "stride_dv")
    types |= dict.fromkeys(("T", "K", "V", *strides), "i32:16")
    numbers = ("H", "R", "chunks", "segments", "segment_chunks", "splits", "stride_gb", "stride_gt", "stride_dg")
    types |= dict.fromkeys(numbers, "i32")
    raw = {"RAW": True, "DOCUMENTS": True, "BLOCK_K": STATE_SIZE, "DOT": tl.bfloat16}
    walk = raw | {"SCALE": False, "scale": None, "INITIAL": False, "initial": None, "SKIP": True, "OUTPUT": True}
    back = raw | {"D_FINAL": False, "d_final": None, "STORE": True}
    gradients = raw | {"SCALE": False, "scale": None, "SKIP": True, "d_scale": None}
    # Of segments: from a state that enters, and for what leaves alone.
    entered = {key: value for key, value in walk.items() if key != "initial"} | {"INITIAL": True, "SAVE": True}
    to_end = walk | {"SAVE": False, "OUTPUT": False, "SKIP": False} | dict.fromkeys(("y", "entering", "skip"))
    left = {key: value for key, value in back.items() if key != "d_final"} | {"D_FINAL": True}
    kernels = (
        ("walk", chunk_state_kernel, walk | {"SAVE": False, "entering": None}, scan.WALK[0]),
        ("walk, states kept", chunk_state_kernel, walk | {"SAVE": True}, scan.WALK[0]),
        ("walk from a state, states kept", chunk_state_kernel, entered, scan.WALK[0]),
        ("walk to the end alone", chunk_state_kernel, to_end, scan.STATES_WALK[0]),
        ("walk back", walk_back_kernel, back, scan.WALK_BACK[0]),
        ("walk back from a gradient", walk_back_kernel, left, scan.WALK_BACK[0]),
        ("walk back to the start alone", walk_back_kernel, back | {"STORE": False, "leaving": None}, scan.WALK_BACK[0]),
        ("gradients", gradients_kernel, gradients, None),
    )
    for tiles in (1, 2):
        for name, kernel, special, config in kernels:
            label = f"mixer {name}, chunks of {tiles * scan.LARGEST_TILE}"
            config = config or scan.GRADIENTS[tiles][0]
            yield kernel_launch(label, kernel, types, special | {"Q": scan.LARGEST_TILE, "TILES": tiles}, config)
    sums = {"parts": "*fp32", "total": "*bf16", "count": "i32"}
    sums |= dict.fromkeys(("columns", "stride_p", "stride_o"), "i32:16")
    yield kernel_launch("sum of parts", sum_parts_kernel, sums, {"BLOCK_P": 32, "BLOCK_C": 128})


def mixer_trial(
    inputs: Inputs, tokens: int, heads: int, groups: int = 1, *, model: int = 64, head_dim: int = 64, state: int = 128,
    norm_groups: int = 1, width: int = 4, chunk: int = 64, lengths: tuple[int, ...] = (), keep: bool = True, rows: int = 1,
    segments: int = 0, exact: str = "reference",
) -> Trial:  # fmt: skip
    """The parts of the projection are their own leaves, so that each one's gradient is judged by its own size.

    segments: into how many Triton's one row is cut, which hand on their states.
    """
    sizes = MixerSizes(heads, head_dim, groups, state, norm_groups, EPSILON)
    names = ("z", "x", "B", "C", "dt")
    widths = (sizes.inner, sizes.inner, groups * state, groups * state, heads)
    leaves = {name: inputs.normal(rows, tokens, each) for name, each in zip(names, widths)}
    leaves |= {
        "conv_weight": inputs.normal(sizes.channels, width, scale=0.5),
        "conv_bias": inputs.normal(sizes.channels, scale=0.1),
        "A_log": inputs.uniform(heads, low=-0.5, high=0.5),
        "D": inputs.uniform(heads, low=0.5, high=1.5),
        "dt_bias": inputs.uniform(heads, low=-2.0, high=-1.0),
        "norm_weight": inputs.normal(sizes.inner),
        "out_weight": inputs.normal(model, sizes.inner, scale=sizes.inner**-0.5),
    }
    starts = first_tokens(documents(inputs, tokens, *lengths, rows=rows)) if lengths else None
    exchange = SegmentsInOrder(starts.view(segments, -1)) if segments and starts is not None else None

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        z, x, B, C, dt, conv, bias, A_log, D, dt_bias, norm, out = given.values()
        projected = torch.cat((z, x, B, C, dt), dim=-1)
        others = conv, bias, A_log, D, dt_bias, norm, out, sizes
        settings: dict[str, Any] = {"chunk_size": chunk, "keep_states": keep, "backend": backend}
        if exchange is not None and backend == "triton":
            settings |= {"document_starts_BT": exchange.starts(), "exchange": exchange}
            mixed = mamba2_mix(projected.view(segments, -1, projected.shape[-1]), *others, **settings)
            return {"out": mixed.view(rows, tokens, -1)}
        return {"out": mamba2_mix(projected, *others, document_starts_BT=starts, **settings)}

    return Trial(leaves, run, SUMS, exact)


def trials() -> Iterator[Sized]:
    """Both chunk sizes of the kernel, heads and groups that tensor ranks have, and heads that share a group's sums."""
    for chunk, lengths in ((64, (40, 1, 23)), (128, (128, 20, 45))):
        build = partial(mixer_trial, tokens=193, heads=2, chunk=chunk, lengths=lengths, keep=chunk == 64)
        yield Sized(f"mixer with documents, chunks of {chunk}", "first", build)
    cut = partial(mixer_trial, tokens=194, heads=2, segments=2, lengths=(40, 70, 84), keep=False)
    yield Sized("mixer in two segments with documents", "first", cut)
    yield Sized("mixer, one token", "small", partial(mixer_trial, tokens=1, heads=1, chunk=16))
    yield Sized(
        "mixer, two groups, two rows, uneven sizes", "small",
        partial(
            mixer_trial, tokens=70, heads=4, groups=2, model=40, head_dim=40, state=72, norm_groups=2, width=3, chunk=32,
            rows=2, lengths=(3, 60, 7),
        ),
    )  # fmt: skip
    long = partial(mixer_trial, tokens=8205, model=1024, lengths=(4000, 1, 63, 4141), exact="torch")
    yield Sized(
        "mixer, 128 heads, documents, states made again", "long", partial(long, heads=128, chunk=128, keep=False)
    )
    yield Sized("mixer, 24 heads in 4 groups", "long", partial(long, heads=24, groups=4, norm_groups=4))


def _on_card(inputs: Inputs, sizes: CardSizes) -> Problem:
    mixer = MixerSizes(sizes.heads, sizes.head_dim, 1, sizes.state, 1, EPSILON)
    return mixer_problem(inputs, sizes.tokens, sizes.model, mixer, 128)


CASE = OperationCase("mamba2", launches, counted_problems, trials, on_card={"mamba2": _on_card})
