"""Mamba2's mixer from its first projection to its output: the operation that holds convolution, scan and gated norm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from amfm.kernels.cases import (
    EPSILON,
    Compute,
    CountedProblem,
    Goal,
    GpuSizes,
    Inputs,
    Minimum,
    OperationCase,
    Problem,
    Sized,
    bfloat16_inputs,
    documents,
    each_pass,
    find_package,
)
from amfm.kernels.common.inputs import first_tokens
from amfm.kernels.decay_scan.case import HEAD_DIM, STATE_SIZE
from amfm.kernels.decay_scan.op import scan_flops
from amfm.kernels.mamba2.op import MixerSizes, mamba2_mix, mixer_bytes
from amfm.kernels.mamba2.rank_part import SegmentsInOrder

# Sums over all tokens: a head's gradients are judged by the size of what they sum.
SUMS = {"A_log": "dt", "dt_bias": "dt"}


def mixer_problem(
    inputs: Inputs, tokens: int, heads: int, groups: int = 1, *, model: int = 64, head_dim: int = HEAD_DIM,
    state: int = STATE_SIZE, norm_groups: int = 1, width: int = 4, chunk: int = 64, lengths: tuple[int, ...] = (),
    keep: bool = True, rows: int = 1, segments: int = 0, whole: bool = False, exact: str = "reference",
) -> Problem:  # fmt: skip
    """The mixer, the product with the output's weight among it; products of libraries are not in the minima.

    Leaves: z, x, B, C and dt, the parts of the projection, apart, so that each one's gradient is judged by its own size, or
    with `whole` the projection [B, T, X] as it is; conv weight and bias, A_log, D, the bias of dt (float32), norm weight, out
    weight. `segments`: into how many Triton's one row is cut, which hand on their states.
    """
    sizes = MixerSizes(heads, head_dim, groups, state, norm_groups, EPSILON)
    names = ("z", "x", "B", "C", "dt")
    widths = (sizes.inner, sizes.inner, groups * state, groups * state, heads)
    parts = {name: inputs.normal(rows, tokens, each) for name, each in zip(names, widths)}
    leaves = {"projected": torch.cat([*parts.values()], dim=-1).detach().requires_grad_()} if whole else parts
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
        *projections, conv, bias, A_log, D, dt_bias, norm, out = given.values()
        projected = torch.cat(projections, dim=-1) if len(projections) > 1 else projections[0]
        others = conv, bias, A_log, D, dt_bias, norm, out, sizes
        settings: dict[str, Any] = {"chunk_size": chunk, "keep_states": keep, "backend": backend}
        if exchange is not None and backend == "triton":
            settings |= {"document_starts_BT": exchange.starts(), "exchange": exchange}
            mixed = mamba2_mix(projected.view(segments, -1, projected.shape[-1]), *others, **settings)
            return {"out": mixed.view(rows, tokens, -1)}
        return {"out": mamba2_mix(projected, *others, document_starts_BT=starts, **settings)}

    def peers() -> dict[str, Compute]:
        theirs = find_package("mamba_ssm.ops.triton.ssd_combined")
        if theirs is None:
            return {}

        def mamba_ssm(projected: Tensor, conv: Tensor, bias: Tensor, A_log: Tensor, *rest: Tensor) -> Tensor:
            D, dt_bias, norm, out = rest
            return theirs.mamba_split_conv1d_scan_combined(
                projected, conv, bias, dt_bias, -A_log.exp(), D=D, chunk_size=256, activation="silu", rmsnorm_weight=norm,
                rmsnorm_eps=EPSILON, outproj_weight=out, headdim=head_dim, ngroups=groups, norm_before_gate=False,
            )  # fmt: skip

        return {"mamba_ssm": mamba_ssm}

    shape = (rows, tokens, heads, groups, state, head_dim)
    least = each_pass(
        lambda back: Minimum(
            mixer_bytes(rows, tokens, sizes, backward=back), scan_flops(*shape, chunk_size=chunk, backward=back)
        )
    )
    text = f"{rows}x{tokens}, {heads} heads x {head_dim}, {groups} groups, state {state}, chunks of {chunk}"
    return Problem(leaves, run, text, *least, peers, sums=SUMS, exact=exact)


def counted_problems() -> Iterator[CountedProblem]:
    """Two policies; the library's products are left out, which no counter of kernels sees."""
    for keep in (True, False):
        problem = mixer_problem(bfloat16_inputs(), 512, 8, chunk=128, keep=keep, whole=True)
        yield CountedProblem(
            "mamba2" if keep else "mamba2_states_again",
            problem,
            Goal("of the formula", problem.forward.bytes, 1.25 if keep else 1.15),
            Goal("of the formula", problem.backward.bytes, 1.75 if keep else 2.0),
        )


def trials() -> Iterator[Sized]:
    """Both chunk sizes of the kernel, heads and groups that tensor ranks have, and heads that share a group's sums."""
    for chunk, lengths in ((64, (40, 1, 23)), (128, (128, 20, 45))):
        build = partial(mixer_problem, tokens=193, heads=2, chunk=chunk, lengths=lengths, keep=chunk == 64)
        yield Sized(f"mixer with documents, chunks of {chunk}", "first", build)
    cut = partial(mixer_problem, tokens=194, heads=2, segments=2, lengths=(40, 70, 84), keep=False)
    yield Sized("mixer in two segments with documents", "first", cut)
    yield Sized("mixer, one token", "small", partial(mixer_problem, tokens=1, heads=1, chunk=16))
    yield Sized(
        "mixer, two groups, two rows, uneven sizes", "small",
        partial(
            mixer_problem, tokens=70, heads=4, groups=2, model=40, head_dim=40, state=72, norm_groups=2, width=3, chunk=32,
            rows=2, lengths=(3, 60, 7),
        ),
    )  # fmt: skip
    long = partial(mixer_problem, tokens=8205, model=1024, lengths=(4000, 1, 63, 4141), exact="torch")
    yield Sized(
        "mixer, 128 heads, documents, states made again", "long", partial(long, heads=128, chunk=128, keep=False)
    )
    yield Sized("mixer, 24 heads in 4 groups", "long", partial(long, heads=24, groups=4, norm_groups=4))


def _on_gpu(inputs: Inputs, sizes: GpuSizes) -> Problem:
    return mixer_problem(
        inputs, sizes.tokens, sizes.heads, model=sizes.model, head_dim=sizes.head_dim, state=sizes.state, chunk=128,
        keep=False, whole=True,
    )  # fmt: skip


CASE = OperationCase("mamba2", counted_problems, trials, on_gpu={"mamba2": _on_gpu})
