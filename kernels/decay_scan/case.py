"""Mamba2's scan, and linear attention with a gate per head: one kernel at two shapes.

TurboS, Nemotron-3-Nano and Granite-4-H all have heads of 64 channels with 128 state numbers, so that the launches of one
stand for the three.

The scan with a gate of each key channel: GLA at a width of 2048 (K = 256, V = 512), HGRN2 (K = V = 128).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from amfm.kernels.cases import (
    Compute,
    CountedProblem,
    Goal,
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
    slices,
)
from amfm.kernels.decay_scan.op import decay_scan, mamba2_scan, scan_bytes, scan_flops, vector_scan_bytes

HEAD_DIM, STATE_SIZE = 64, 128
# Sums over all tokens: a head's gradients are judged by the size of what they sum.
SUMS = {"A_log": "dt", "dt_bias": "dt"}


def mamba2_problem(
    inputs: Inputs, tokens: int, heads: int, groups: int = 1, *, head_dim: int = HEAD_DIM, state: int = STATE_SIZE,
    chunk: int = 64, lengths: tuple[int, ...] = (), initial: bool = False, keep: bool = True, sliced: bool = False,
    rows: int = 1, exact: str = "reference",
) -> Problem:  # fmt: skip
    """The scan of Mamba2 from dt before its softplus to y, in chunks of `chunk`; `keep`: states stay for backward.

    Leaves: x [B, T, H, P], dt [B, T, H], A_log [H], B and C [B, T, G, N], D [H] and the bias of dt [H], and where `initial`
    the first state. `sliced`: x, B and C are slices of one projection. dt has the dtype of x, because one projection makes
    both; A_log, D and the bias are float32.
    """
    H, P, G, N = heads, head_dim, groups, state
    widths = (H * P, G * N, G * N)
    if sliced:
        x, B, C = slices(inputs.normal(rows, tokens, sum(widths)), *widths)
        shaped = (x.unflatten(-1, (H, P)), B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N)))
        x, B, C = (each.detach().requires_grad_() for each in shaped)
    else:
        x, B, C = (inputs.normal(rows, tokens, *shape) for shape in ((H, P), (G, N), (G, N)))
        B = (B.detach() * N**-0.5).requires_grad_()
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
        out = mamba2_scan(
            *[*given.values()][:7], document_ids_BT=ids, initial_state_BHPN=given.get("initial"), chunk_size=chunk,
            keep_states=keep, backend=backend,
        )  # fmt: skip
        return {"y": out.y_BTHP, "final state": out.final_state_BHPN}

    def peers() -> dict[str, Compute]:
        theirs = find_package("mamba_ssm.ops.triton.ssd_combined")
        if theirs is None:
            return {}

        def mamba_ssm(x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
            A = -A_log.exp()
            return theirs.mamba_chunk_scan_combined(x, dt, A, B, C, 256, D=D, dt_bias=bias, dt_softplus=True)

        return {"mamba_ssm": mamba_ssm}

    least = scan_minima(rows, tokens, H, G, N, P, chunk=chunk)
    text = f"{rows}x{tokens}, {H} heads x {P}, state {N}"
    return Problem(leaves, run, text, *least, peers, sums=SUMS, exact=exact)


def scan_minima(*shape: int, chunk: int) -> tuple[Minimum, Minimum]:
    """The least of a scan of rows, tokens, heads, groups, state numbers and channels."""
    return each_pass(
        lambda back: Minimum(scan_bytes(*shape, backward=back), scan_flops(*shape, chunk_size=chunk, backward=back))
    )


def decay_problem(
    inputs: Inputs, tokens: int, heads: int, key: int, value: int, *, rows: int = 1, chunk: int = 64, channels: bool = False,
    lengths: tuple[int, ...] = (), initial: bool = False, keep: bool = True, exact: str = "reference",
) -> Problem:  # fmt: skip
    """Linear attention with decay: a gate per head, as in RetNet and simple GLA, or with `channels` one per key channel.

    Leaves: q and k [B, T, H, K] and v [B, T, H, V], scaled so that products of rows stay near 1, g [B, T, H] or [B, T, H, K]
    float32, and where `initial` the first state.
    """
    leaves = {name: inputs.normal(rows, tokens, heads, key, scale=key**-0.5) for name in ("q", "k")}
    leaves["v"] = inputs.normal(rows, tokens, heads, value)
    leaves["g"] = inputs.uniform(rows, tokens, heads, *((key,) if channels else ()), low=-0.5)
    with torch.no_grad():
        leaves["g"].clamp_(max=0.0)
    if initial:
        leaves["initial"] = inputs.normal(rows, heads, key, value, dtype=torch.float32)
    ids = documents(inputs, tokens, *lengths, rows=rows) if lengths else None

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        out = decay_scan(
            given["q"], given["k"], given["v"], given["g"], document_ids_BT=ids, initial_state_BHKV=given.get("initial"),
            chunk_size=chunk, keep_states=keep, backend=backend,
        )  # fmt: skip
        return {"o": out.o_BTHV, "final state": out.final_state_BHKV}

    def peers() -> dict[str, Compute]:
        theirs = find_package("fla.ops.gla" if channels else "fla.ops.simple_gla")
        if theirs is None:
            return {}
        scan = theirs.chunk_gla if channels else theirs.chunk_simple_gla
        return {"fla": lambda q, k, v, g: scan(q, k, v, g=g, scale=1.0)[0]}

    shape = rows, tokens, heads, key, value
    moved = partial(vector_scan_bytes, *shape) if channels else partial(scan_bytes, *shape[:3], *shape[2:])
    flops = partial(scan_flops, *shape[:3], *shape[2:], chunk_size=chunk)
    least = each_pass(lambda back: Minimum(moved(backward=back), flops(backward=back)))
    text = f"{rows}x{tokens}, {heads} heads, states of {key} x {value}"
    return Problem(leaves, run, text, *least, peers, exact=exact)


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
        problem = mamba2_problem(bfloat16_inputs(), tokens, heads, chunk=chunk, keep=keep)
        yield CountedProblem(
            op,
            replace(problem, shape=f"{problem.shape}, chunks of {chunk}"),
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


def _segmented_problem(tokens: int, heads: int, chunk: int, segments: int) -> CountedProblem:
    """The walk cut into segments, as long rows with few heads are; only forward, with no choice of backend."""
    whole = mamba2_problem(bfloat16_inputs(), tokens, heads, chunk=chunk)
    per_segment = tokens // chunk // segments

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        from amfm.kernels.decay_scan.triton_impl import scan_triton

        assert backend == "triton", "segments are a matter of the Triton kernel"
        # Without gradients, or states would be kept for a backward pass.
        x, dt, _, B, C, D, _ = (each.detach() for each in given.values())
        scale = dt.float().abs()
        return {"y": scan_triton(C, B, x, -scale, scale, D, None, None, chunk, segment_chunks=per_segment)[0]}

    return CountedProblem(
        "decay_scan_segmented",
        replace(whole, shape=f"{whole.shape}, {segments} segments", run=run),
        Goal("4d + 4GN + 4H bytes per token", _least_bytes(tokens, heads), 1.7),
        has_backward=False,
    )


def trials() -> Iterator[Sized]:
    """Mamba2 and a gate per head, at both chunk sizes of the kernel."""
    for chunk, lengths in ((64, (40, 1, 23)), (128, (128, 20, 45))):
        build = partial(
            mamba2_problem, tokens=193, heads=2, chunk=chunk, lengths=lengths, initial=True, keep=chunk == 64
        )
        yield Sized(f"Mamba2 with documents, chunks of {chunk}", "first", build)
    yield Sized("Mamba2, one token", "small", partial(mamba2_problem, tokens=1, heads=1, chunk=16, initial=True))
    yield Sized(
        "Mamba2, two groups, two rows, uneven sizes", "small",
        partial(mamba2_problem, tokens=100, heads=4, groups=2, head_dim=40, state=72, chunk=32, rows=2, lengths=(3, 90, 7)),
    )  # fmt: skip
    yield Sized("Mamba2, slices of a projection", "small", partial(mamba2_problem, tokens=63, heads=3, sliced=True))
    yield Sized(
        "gate per head", "small", partial(decay_problem, tokens=129, heads=2, key=32, value=48, lengths=(70, 59))
    )
    wide = partial(decay_problem, tokens=70, heads=2, key=136, value=16, lengths=(50, 20), initial=True)
    yield Sized("gate per head, a wide state", "small", wide)
    yield Sized(
        "Mamba2, 128 heads and documents", "long",
        partial(mamba2_problem, tokens=8205, heads=128, chunk=128, lengths=(4000, 1, 63, 4141), keep=False, exact="torch"),
    )  # fmt: skip
    yield Sized(
        "Mamba2, 24 heads (48 on 2 tensor ranks), slices", "long",
        partial(mamba2_problem, tokens=8205, heads=24, groups=4, sliced=True, exact="torch"),
    )  # fmt: skip
    yield Sized(
        "Mamba2, 2 heads in segments", "long",
        partial(mamba2_problem, tokens=32771, heads=2, lengths=(20000, 12771), initial=True, exact="torch"),
    )  # fmt: skip
    yield Sized(
        "gate per head, states of 256 x 256", "long",
        partial(decay_problem, tokens=8205, heads=8, key=256, value=256, chunk=128, initial=True, exact="torch"),
    )  # fmt: skip


def segments_of_rows() -> None:
    """The states that are handed from segment to segment where just rows and heads leave processors idle."""
    from amfm.kernels.decay_scan.triton_impl import scan_triton

    q = torch.empty(1, 256, 1, STATE_SIZE, dtype=torch.bfloat16, device="meta", requires_grad=True)
    v, g = q.new_empty(1, 256, 2, HEAD_DIM), q.new_empty(1, 256, 2, dtype=torch.float32)
    y, _ = scan_triton(q, q, v, g, None, None, None, None, 64, segment_chunks=2)
    torch.autograd.grad(y, q, torch.empty_like(y))


def _on_gpu(inputs: Inputs, sizes: GpuSizes) -> Problem:
    return mamba2_problem(inputs, sizes.tokens, sizes.heads, head_dim=sizes.head_dim, state=sizes.state)


def _on_host(inputs: Inputs, sizes: HostSizes) -> Problem:
    return mamba2_problem(
        inputs, sizes.tokens, sizes.heads, rows=sizes.rows, head_dim=sizes.head_dim, state=sizes.state
    )


def _linear_attention_on_gpu(inputs: Inputs, sizes: GpuSizes) -> Problem:
    return decay_problem(inputs, sizes.tokens, sizes.attention_heads, sizes.attention_dim, sizes.attention_dim)


CASE = OperationCase(
    "decay_scan",
    counted_problems,
    trials,
    on_gpu={"decay_scan": _on_gpu, "linear_attention": _linear_attention_on_gpu},
    on_host={"decay_scan": _on_host},
    also=segments_of_rows,
)


def counted_vector_problems() -> Iterator[CountedProblem]:
    """One head of HGRN2 with states kept and made again, and of GLA at a width of 2048."""
    for tokens, K, V, keep in ((512, 128, 128, True), (512, 128, 128, False), (1024, 256, 512, False)):
        problem = decay_problem(bfloat16_inputs(), tokens, 1, K, V, channels=True, keep=keep)
        yield CountedProblem(
            "decay_scan_vector_states_kept" if keep else "decay_scan_vector",
            problem,
            None if keep else Goal("of the formula", problem.forward.bytes, 2),
            Goal("of the formula", problem.backward.bytes, 5),
        )


def vector_trials() -> Iterator[Sized]:
    """A gate per key channel: HGRN2's states, GLA's, and uneven ones."""
    yield Sized(
        "HGRN2 with documents", "first",
        partial(decay_problem, tokens=150, heads=2, key=128, value=128, channels=True, lengths=(64, 1, 85), initial=True),
    )  # fmt: skip
    yield Sized(
        "uneven sizes, states made again", "small",
        partial(decay_problem, tokens=100, heads=1, key=40, value=24, channels=True, chunk=32, keep=False),
    )  # fmt: skip
    yield Sized(
        "GLA, K = 256", "long",
        partial(decay_problem, tokens=8205, heads=4, key=256, value=512, channels=True, lengths=(5000, 3205), exact="torch"),
    )  # fmt: skip


def _vector_on_gpu(inputs: Inputs, sizes: GpuSizes) -> Problem:
    size = sizes.attention_dim
    return decay_problem(inputs, sizes.tokens, sizes.attention_heads, size, size, channels=True)


def _vector_on_host(inputs: Inputs, sizes: HostSizes) -> Problem:
    size = sizes.head_dim
    return decay_problem(inputs, sizes.tokens, sizes.heads, size, size, rows=sizes.rows, channels=True)


VECTOR_CASE = OperationCase(
    "decay_scan_vector",
    counted_vector_problems,
    vector_trials,
    on_gpu={"decay_scan_vector": _vector_on_gpu},
    on_host={"decay_scan_vector": _vector_on_host},
)
