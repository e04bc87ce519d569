"""Mamba2's scan, and linear attention with a gate per head: one kernel at two shapes.

TurboS, Nemotron-3-Nano and Granite-4-H all have heads of 64 channels with 128 state numbers, so that the launches of one
stand for the three.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from amfm.kernels.cases.operation import KernelLaunch, OperationCase, kernel_launch
from amfm.kernels.cases.problem import (
    CardSizes,
    Compute,
    CountedProblem,
    Goal,
    HostSizes,
    Inputs,
    Minimum,
    Problem,
    bfloat16_inputs,
    find_package,
)
from amfm.kernels.cases.trial import Sized, Trial, documents, slices
from amfm.kernels.decay_scan.op import decay_scan, mamba2_scan, scan_bytes, scan_flops

HEAD_DIM, STATE_SIZE = 64, 128
# Sums over all tokens: a head's gradients are judged by the size of what they sum.
SUMS = {"A_log": "dt", "dt_bias": "dt"}


def mamba2_problem(
    inputs: Inputs, rows: int, tokens: int, heads: int, head_dim: int, state: int, chunk: int = 64, keep: bool = True
) -> Problem:
    """The scan of Mamba2 from dt before its softplus to y, in chunks of `chunk`; `keep`: states stay for backward.

    Leaves: x [B, T, H, P], dt [B, T, H], A_log [H], B and C [B, T, 1, N] (one group), D [H] and the bias of dt
    [H]. dt has the dtype of x, because one projection makes both; A_log, D and the bias are float32.
    """
    H, P, N, T = heads, head_dim, state, tokens
    x, dt = inputs.normal(rows, T, H, P), inputs.normal(rows, T, H)
    B, C = (inputs.normal(rows, T, 1, N, scale=0.3) for _ in range(2))
    A_log, D, bias = inputs.uniform(H), inputs.uniform(H, low=1.0), inputs.uniform(H, low=-1.0)

    def run(*leaves: Tensor, backend: str) -> Tensor:
        return mamba2_scan(*leaves, chunk_size=chunk, keep_states=keep, backend=backend).y_BTHP

    def peers() -> dict[str, Compute]:
        theirs = find_package("mamba_ssm.ops.triton.ssd_combined")
        if theirs is None:
            return {}

        def mamba_ssm(x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
            A = -A_log.exp()
            return theirs.mamba_chunk_scan_combined(x, dt, A, B, C, 256, D=D, dt_bias=bias, dt_softplus=True)

        return {"mamba_ssm": mamba_ssm}

    shape = (rows, T, H, 1, N, P)
    forward, backward = (
        Minimum(scan_bytes(*shape, backward=way), scan_flops(*shape, chunk_size=chunk, backward=way))
        for way in (False, True)
    )
    text = f"{rows}x{T}, {H} heads x {P}, state {N}"
    return Problem(text, (x, dt, A_log, B, C, D, bias), run, forward, backward, peers)


def linear_attention_problem(inputs: Inputs, tokens: int, heads: int, size: int) -> Problem:
    """Heads with their own keys and a gate per head, as in RetNet and simple GLA.

    Leaves: q, k and v [1, T, H, size], scaled so that products of rows stay near 1, and g [1, T, H] float32.
    """
    leaves = tuple(inputs.normal(1, tokens, heads, size, scale=size**-0.5) for _ in range(3))

    def peers() -> dict[str, Compute]:
        theirs = find_package("fla.ops.simple_gla")
        return {"fla": lambda q, k, v, g: theirs.chunk_simple_gla(q, k, v, g=g, scale=1.0)[0]} if theirs else {}

    shape = (1, tokens, heads, heads, size, size)
    forward, backward = (
        Minimum(scan_bytes(*shape, backward=way), scan_flops(*shape, chunk_size=64, backward=way))
        for way in (False, True)
    )
    return Problem(
        f"1x{tokens}, {heads} heads x {size}",
        (*leaves, inputs.uniform(1, tokens, heads, low=-1.0, high=0.0)),
        lambda *leaves, backend: decay_scan(*leaves, backend=backend).o_BTHV,
        forward,
        backward,
        peers,
    )


def counted_problems() -> Iterator[CountedProblem]:
    """Rows long enough that what is written once per row weighs as little as in production.

    Each goal is one of a policy: forward's where backward walks the row again, backward's where the states are kept.
    """
    for op, heads, chunk, keep, has_backward in (
        ("decay_scan", 8, 64, False, False),  # the goal of backward is one of chunks of 128
        ("decay_scan", 16, 128, False, True),
        ("decay_scan_states_kept", 16, 128, True, True),
    ):
        tokens, width = 2048, heads * HEAD_DIM
        problem = mamba2_problem(bfloat16_inputs(), 1, tokens, heads, HEAD_DIM, STATE_SIZE, chunk, keep)
        yield CountedProblem(
            op,
            _with_chunks(problem, f"chunks of {chunk}"),
            None if keep else Goal("4d + 4GN + 4H bytes per token", _least_bytes(tokens, heads), 1.15),
            Goal("d bytes per token", tokens * width, 16) if keep else None,
            has_backward,
        )
    yield _segmented_problem(tokens=8192, heads=4, chunk=128, segments=2)


def _least_bytes(tokens: int, heads: int) -> int:
    """Bytes of a forward pass over `tokens` tokens.

    x and y (d = heads * HEAD_DIM bfloat16 numbers each), B and C of one group, and a float32 step a head.
    """
    return tokens * (4 * heads * HEAD_DIM + 4 * STATE_SIZE + 4 * heads)


def _with_chunks(problem: Problem, text: str, run: Compute | None = None) -> Problem:
    """The problem with more said about its shape and, where given, another call."""
    return Problem(
        f"{problem.shape}, {text}", problem.leaves, run or problem.run, problem.forward, problem.backward, problem.peers
    )


def _segmented_problem(tokens: int, heads: int, chunk: int, segments: int) -> CountedProblem:
    """The walk cut into segments, as long rows with few heads are; forward alone, with no choice of backend."""
    whole = mamba2_problem(bfloat16_inputs(), 1, tokens, heads, HEAD_DIM, STATE_SIZE, chunk)
    per_segment = tokens // chunk // segments

    def run(
        x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor, backend: str
    ) -> Tensor:
        from amfm.kernels.decay_scan.triton_impl import scan_triton

        assert backend == "triton", "segments are a matter of the Triton kernel"
        del A_log, bias
        # Without gradients, or states would be kept for a backward pass.
        x, B, C, D, scale = (each.detach() for each in (x, B, C, D, dt.float().abs()))
        return scan_triton(C, B, x, -scale, scale, D, None, None, chunk, segment_chunks=per_segment)[0]

    return CountedProblem(
        "decay_scan_segmented",
        _with_chunks(whole, f"{segments} segments", run),
        Goal("4d + 4GN + 4H bytes per token", _least_bytes(tokens, heads), 1.7),
        has_backward=False,
    )


def launches() -> Iterator[KernelLaunch]:
    """The scan's kernels at both chunk sizes, with documents.

    The walk is compiled in each form that forward and backward launch: with outputs, with outputs and states,
    with states alone.
    """
    import triton.language as tl

    from amfm.kernels.common import segment_states
    from amfm.kernels.decay_scan import launch as scan
    from amfm.kernels.decay_scan.triton_backward import gradients_kernel, walk_back_kernel
    from amfm.kernels.decay_scan.triton_forward import chunk_state_kernel

    types = dict.fromkeys(("q", "k", "v", "y", "d_y", "d_v", "d_q", "d_k", "entering", "leaving"), "*bf16")
    floats = ("g", "scale", "skip", "final", "decay", "initial", "d_final", "d_initial", "d_g", "d_scale", "d_heads")
    types |= dict.fromkeys((*floats, "A_log", "bias"), "*fp32") | {"firsts": "*i32"}
    strides = ("stride_qb", "stride_qt", "stride_kb", "stride_kt", "stride_vb", "stride_vt", "stride_dq", "stride_dv")
    types |= dict.fromkeys(("T", "K", "V", *strides), "i32:16")
    types |= dict.fromkeys(("H", "R", "chunks", "segments", "segment_chunks", "splits"), "i32")
    types |= dict.fromkeys(("stride_gb", "stride_gt", "stride_dg"), "i32")
    scaled = {"SCALE": True, "RAW": False, "A_log": None, "bias": None, "INITIAL": False, "initial": None}
    outputs = scaled | {"SKIP": True, "OUTPUT": True}
    states = scaled | {"SKIP": False, "skip": None, "OUTPUT": False, "y": None, "SAVE": True}
    gates = {"A_log": None, "bias": None, "RAW": False}
    back = {"D_FINAL": False, "d_final": None, "STORE": True, **gates}
    kernels = (
        ("walk", chunk_state_kernel, outputs | {"SAVE": False, "entering": None}, scan.WALK[0]),
        ("walk, states kept", chunk_state_kernel, outputs | {"SAVE": True}, scan.WALK[0]),
        ("walk, states only", chunk_state_kernel, states, scan.STATES_WALK[0]),
        ("walk back", walk_back_kernel, back, scan.WALK_BACK[0]),
        ("gradients", gradients_kernel, {"SCALE": True, "SKIP": True, **gates}, None),
    )
    for tiles in (1, 2):
        common = {"Q": scan.LARGEST_TILE, "TILES": tiles, "BLOCK_K": STATE_SIZE, "DOT": tl.bfloat16, "DOCUMENTS": True}
        for name, kernel, special, config in kernels:
            label = f"scan {name}, chunks of {tiles * scan.LARGEST_TILE}"
            config = config or scan.GRADIENTS[tiles][0]
            yield kernel_launch(label, kernel, types, common | special, config)
    types = dict.fromkeys(("local", "decay", "entering", "final"), "*fp32") | {"segments": "i32"}
    types |= dict.fromkeys(("numbers", "span"), "i32:16")
    passed = {"INITIAL": False, "initial": None, "BACKWARD": True, "BLOCK": segment_states.BLOCK}
    yield kernel_launch("states of segments", segment_states.pass_states_kernel, types, passed)


def mamba2_trial(
    inputs: Inputs, tokens: int, heads: int, groups: int = 1, *, head_dim: int = 64, state: int = 128, chunk: int = 64,
    lengths: tuple[int, ...] = (), initial: bool = False, keep: bool = True, sliced: bool = False, rows: int = 1,
    exact: str = "reference",
) -> Trial:  # fmt: skip
    """Mamba2's scan; `sliced`: x, B and C are slices of one projection."""
    H, P, G, N = heads, head_dim, groups, state
    widths = (H * P, G * N, G * N)
    if sliced:
        x, B, C = slices(inputs.normal(rows, tokens, sum(widths)), *widths)
        shaped = (x.unflatten(-1, (H, P)), B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N)))
        x, B, C = (each.detach().requires_grad_() for each in shaped)
    else:
        x, B, C = (
            inputs.normal(rows, tokens, H, P),
            inputs.normal(rows, tokens, G, N),
            inputs.normal(rows, tokens, G, N),
        )
    B = (B.detach() * N**-0.5).requires_grad_() if not sliced else B
    leaves = {
        "x": x,
        "dt": inputs.normal(rows, tokens, H),
        "A_log": inputs.uniform(H, low=-0.5, high=0.5),
        "B": B,
        "C": C,
    }
    leaves |= {"D": inputs.uniform(H, low=0.5, high=1.5), "dt_bias": inputs.uniform(H, low=-2.0, high=-1.0)}
    if initial:
        leaves["initial"] = inputs.normal(rows, H, P, N, dtype=torch.float32)
    ids = documents(inputs, tokens, *lengths, rows=rows) if lengths else None

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        names = ("x", "dt", "A_log", "B", "C", "D", "dt_bias")
        out = mamba2_scan(
            *(given[name] for name in names), document_ids_BT=ids, initial_state_BHPN=given.get("initial"),
            chunk_size=chunk, keep_states=keep, backend=backend,
        )  # fmt: skip
        return {"y": out.y_BTHP, "final state": out.final_state_BHPN}

    return Trial(leaves, run, SUMS, exact)


def decay_trial(
    inputs: Inputs, tokens: int, heads: int, key: int, value: int, *, chunk: int = 64, channels: bool = False,
    lengths: tuple[int, ...] = (), initial: bool = False, keep: bool = True, exact: str = "reference",
) -> Trial:  # fmt: skip
    """Linear attention with decay, a gate per head or, with `channels`, a gate per key channel."""
    leaves = {name: inputs.normal(1, tokens, heads, key, scale=key**-0.5) for name in ("q", "k")}
    leaves["v"] = inputs.normal(1, tokens, heads, value)
    leaves["g"] = inputs.uniform(1, tokens, heads, *((key,) if channels else ()), low=-0.5)
    with torch.no_grad():
        leaves["g"].clamp_(max=0.0)
    if initial:
        leaves["initial"] = inputs.normal(1, heads, key, value, dtype=torch.float32)
    ids = documents(inputs, tokens, *lengths) if lengths else None

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        out = decay_scan(
            given["q"], given["k"], given["v"], given["g"], document_ids_BT=ids, initial_state_BHKV=given.get("initial"),
            chunk_size=chunk, keep_states=keep, backend=backend,
        )  # fmt: skip
        return {"o": out.o_BTHV, "final state": out.final_state_BHKV}

    return Trial(leaves, run, exact=exact)


def trials() -> Iterator[Sized]:
    """Mamba2 and a gate per head, at both chunk sizes of the kernel."""
    for chunk, lengths in ((64, (40, 1, 23)), (128, (128, 20, 45))):
        build = partial(mamba2_trial, tokens=193, heads=2, chunk=chunk, lengths=lengths, initial=True, keep=chunk == 64)
        yield Sized(f"Mamba2 with documents, chunks of {chunk}", "first", build)
    yield Sized("Mamba2, one token", "small", partial(mamba2_trial, tokens=1, heads=1, chunk=16, initial=True))
    yield Sized(
        "Mamba2, two groups, two rows, uneven sizes", "small",
        partial(mamba2_trial, tokens=100, heads=4, groups=2, head_dim=40, state=72, chunk=32, rows=2, lengths=(3, 90, 7)),
    )  # fmt: skip
    yield Sized("Mamba2, slices of a projection", "small", partial(mamba2_trial, tokens=63, heads=3, sliced=True))
    yield Sized("gate per head", "small", partial(decay_trial, tokens=129, heads=2, key=32, value=48, lengths=(70, 59)))
    yield Sized(
        "Mamba2, 128 heads and documents", "long",
        partial(mamba2_trial, tokens=8205, heads=128, chunk=128, lengths=(4000, 1, 63, 4141), keep=False, exact="torch"),
    )  # fmt: skip
    yield Sized(
        "Mamba2, 24 heads (48 on 2 tensor ranks), slices", "long",
        partial(mamba2_trial, tokens=8205, heads=24, groups=4, sliced=True, exact="torch"),
    )  # fmt: skip
    yield Sized(
        "Mamba2, 2 heads in segments", "long",
        partial(mamba2_trial, tokens=32771, heads=2, lengths=(20000, 12771), initial=True, exact="torch"),
    )  # fmt: skip
    yield Sized(
        "gate per head, states of 256 x 256", "long",
        partial(decay_trial, tokens=8205, heads=8, key=256, value=256, chunk=128, initial=True, exact="torch"),
    )  # fmt: skip


def _on_card(inputs: Inputs, sizes: CardSizes) -> Problem:
    return mamba2_problem(inputs, 1, sizes.tokens, sizes.heads, sizes.head_dim, sizes.state)


def _on_host(inputs: Inputs, sizes: HostSizes) -> Problem:
    return mamba2_problem(inputs, sizes.rows, sizes.tokens, sizes.heads, sizes.head_dim, sizes.state)


def _linear_attention_on_card(inputs: Inputs, sizes: CardSizes) -> Problem:
    return linear_attention_problem(inputs, sizes.tokens, sizes.attention_heads, sizes.attention_dim)


CASE = OperationCase(
    "decay_scan",
    launches,
    counted_problems,
    trials,
    on_card={"decay_scan": _on_card, "linear_attention": _linear_attention_on_card},
    on_host={"decay_scan": _on_host},
)
