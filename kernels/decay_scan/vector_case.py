"""The scan with a gate of each key channel: GLA at a width of 2048 (K = 256, V = 512), HGRN2 (K = V = 128)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

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
from amfm.kernels.cases.trial import Sized
from amfm.kernels.decay_scan.case import decay_trial
from amfm.kernels.decay_scan.op import decay_scan, scan_flops, vector_scan_bytes

CHUNK_SIZE = 64


def vector_problem(
    inputs: Inputs, rows: int, tokens: int, heads: int, key_size: int, value_size: int, text: str, keep: bool = True
) -> Problem:
    """Heads with gates between -1 and 0; `text` describes the states, `keep`: states stay for backward.

    Leaves: q and k [B, T, H, K], v [B, T, H, V], g [B, T, H, K] float32. q, k and v are scaled so that products
    of rows stay near 1.
    """
    T, H, K, V = tokens, heads, key_size, value_size
    q, k = (inputs.normal(rows, T, H, K, scale=K**-0.5) for _ in range(2))
    v, g = inputs.normal(rows, T, H, V, scale=V**-0.5), inputs.uniform(rows, T, H, K, low=-1.0, high=0.0)

    def run(*leaves: Tensor, backend: str) -> Tensor:
        return decay_scan(*leaves, keep_states=keep, backend=backend).o_BTHV

    def peers() -> dict[str, Compute]:
        theirs = find_package("fla.ops.gla")
        return {"fla": lambda q, k, v, g: theirs.chunk_gla(q, k, v, g, scale=1.0)[0]} if theirs else {}

    shape, products = (rows, T, H, K, V), (rows, T, H, H, K, V)
    forward, backward = (
        Minimum(vector_scan_bytes(*shape, backward=way), scan_flops(*products, chunk_size=CHUNK_SIZE, backward=way))
        for way in (False, True)
    )
    return Problem(f"{rows}x{T}, {text}", (q, k, v, g), run, forward, backward, peers)


def counted_problems() -> Iterator[CountedProblem]:
    """One head of HGRN2 with states kept and made again, and of GLA at a width of 2048."""
    for tokens, K, V, keep in ((512, 128, 128, True), (512, 128, 128, False), (1024, 256, 512, False)):
        text = f"1 head, states of {K} x {V}, chunks of {CHUNK_SIZE}"
        problem = vector_problem(bfloat16_inputs(), 1, tokens, 1, K, V, text, keep)
        yield CountedProblem(
            "decay_scan_vector_states_kept" if keep else "decay_scan_vector",
            problem,
            None if keep else Goal("of the formula", problem.forward.bytes, 2),
            Goal("of the formula", problem.backward.bytes, 5),
        )


def launches() -> Iterator[KernelLaunch]:
    """The kernels of both models' states, with documents.

    Prepare and gradients take channels in parts, so one size of K stands for both models; the walks hold all of
    K.
    """
    import triton.language as tl

    from amfm.kernels.decay_scan.vector import triton_impl as vector
    from amfm.kernels.decay_scan.vector.triton_backward import (
        score_gradients_kernel,
        vector_gradients_kernel,
        vector_walk_back_kernel,
    )
    from amfm.kernels.decay_scan.vector.triton_forward import prepare_kernel, vector_walk_kernel

    inputs = ("q", "k", "v", "o", "d_o", "d_q", "d_k", "d_v")
    scratch = ("q_start", "k_end", "scores", "d_scores", "entering", "leaving")
    floats = ("g", "decay", "initial", "final", "total", "d_final", "d_initial", "d_g")
    types = dict.fromkeys(inputs + scratch, "*bf16") | dict.fromkeys(floats, "*fp32") | {"firsts": "*i32"}
    types |= dict.fromkeys(("T", "K", "V", *(f"stride_{name}{dim}" for name in "qkv" for dim in "bt")), "i32:16")
    types |= dict.fromkeys(("H", "tiles", "segments", "segment_tiles"), "i32")
    tile = {"Q": CHUNK_SIZE, "DOT": tl.bfloat16}
    halved = tile | {"LEVELS": CHUNK_SIZE.bit_length() - 1, "DOCUMENTS": True}
    yield kernel_launch("vector scan prepare", prepare_kernel, types, halved, vector.PREPARE[0])
    outputs = {"OUTPUT": True, "SAVE": False, "entering": None}
    walks = (
        ("walk", vector_walk_kernel, outputs),
        ("walk, states kept", vector_walk_kernel, {"OUTPUT": True, "SAVE": True}),
        ("walk, states only", vector_walk_kernel, {"OUTPUT": False, "SAVE": True, "o": None}),
        ("walk back", vector_walk_back_kernel, {"STORE": True}),
    )
    for label, size in (("GLA, K = 256", 256), ("HGRN2, K = 128", 128)):
        for name, kernel, special in walks:
            start = "d_final" if kernel is vector_walk_back_kernel else "initial"
            constants = tile | special | {"BLOCK_K": size, start.upper(): False, start: None}
            config = vector.walk_candidates(size)[0]
            yield kernel_launch(f"vector scan {name}, {label}", kernel, types, constants, config)
    config = vector.SCORE_GRADIENTS[0]
    yield kernel_launch("vector scan gradients of scores", score_gradients_kernel, types, tile, config)
    yield kernel_launch("vector scan gradients", vector_gradients_kernel, types, halved, vector.GRADIENTS[0])


def trials() -> Iterator[Sized]:
    """A gate per key channel: HGRN2's states, GLA's, and uneven ones."""
    yield Sized(
        "HGRN2 with documents", "first",
        partial(decay_trial, tokens=150, heads=2, key=128, value=128, channels=True, lengths=(64, 1, 85), initial=True),
    )  # fmt: skip
    yield Sized(
        "uneven sizes, states made again", "small",
        partial(decay_trial, tokens=100, heads=1, key=40, value=24, channels=True, chunk=32, keep=False),
    )  # fmt: skip
    yield Sized(
        "GLA, K = 256", "long",
        partial(decay_trial, tokens=8205, heads=4, key=256, value=512, channels=True, lengths=(5000, 3205), exact="torch"),
    )  # fmt: skip


def _on_card(inputs: Inputs, sizes: CardSizes) -> Problem:
    heads, size = sizes.attention_heads, sizes.attention_dim
    return vector_problem(inputs, 1, sizes.tokens, heads, size, size, f"{heads} heads, states of {size} x {size}")


def _on_host(inputs: Inputs, sizes: HostSizes) -> Problem:
    heads, size = sizes.heads, sizes.head_dim
    text = f"{heads} heads x {size}, state {size}"
    return vector_problem(inputs, sizes.rows, sizes.tokens, heads, size, size, text)


CASE = OperationCase(
    "decay_scan_vector",
    launches,
    counted_problems,
    trials,
    on_card={"decay_scan_vector": _on_card},
    on_host={"decay_scan_vector": _on_host},
)
