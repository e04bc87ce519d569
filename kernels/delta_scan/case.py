"""The delta rule: Gated DeltaNet as in Qwen3-Next (states of 128 x 128, one step per token) and its relatives.

Compiled ahead of time are also DeltaProduct with two steps per token, and Kimi Delta Attention as in Kimi Linear (a
gate of each of 128 key channels).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
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
from amfm.kernels.cases.trial import Sized, Trial, documents
from amfm.kernels.common.limits import DELTA_LIMITS, VECTOR_DELTA_LIMITS
from amfm.kernels.delta_scan.op import delta_bytes, delta_flops, delta_scan
from amfm.kernels.runtime.tuning import Config

CHUNK_SIZE, STATE_SIZE = 64, 128


def delta_problem(
    inputs: Inputs, rows: int, tokens: int, key_heads: int, heads: int, size: int, text: str | None = None
) -> Problem:
    """Gated, one step per token, heads / key_heads value heads per key head; `text` describes heads and states.

    Leaves: q [B, T, G, K], k [B, T, 1, G, K] of length 1, v [B, T, 1, H, K], beta [B, T, 1, H] and g [B, T, H],
    the last two float32. The peer takes a key head for each head, so its call repeats them.
    """
    T, G, H, K = tokens, key_heads, heads, size
    q, v = inputs.normal(rows, T, G, K, scale=K**-0.5), inputs.normal(rows, T, 1, H, K)
    k, beta = inputs.directions(rows, T, 1, G, K).requires_grad_(), inputs.uniform(rows, T, 1, H)
    g = inputs.uniform(rows, T, H, low=-1.0, high=0.0)

    def peers() -> dict[str, Compute]:
        theirs = find_package("fla.ops.gated_delta_rule")
        if theirs is None:
            return {}

        def fla(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
            queries, keys = (x.repeat_interleave(H // G, dim=2) for x in (q, k[:, :, 0]))
            return theirs.chunk_gated_delta_rule(queries, keys, v[:, :, 0], g, beta[:, :, 0], scale=1.0)[0]

        return {"fla": fla}

    shape = (rows, T, 1, G, H, K, K)
    forward, backward = (
        Minimum(delta_bytes(*shape, backward=way), delta_flops(*shape, chunk_size=CHUNK_SIZE, backward=way))
        for way in (False, True)
    )
    return Problem(
        f"{rows}x{T}, {text or f'{G} key heads, {H} heads, states of {K} x {K}'}",
        (q, k, v, beta, g),
        lambda *leaves, backend: delta_scan(*leaves, chunk_size=CHUNK_SIZE, backend=backend).o_BTHV,
        forward,
        backward,
        peers,
    )


def counted_problems() -> Iterator[CountedProblem]:
    """One row, with two value heads per key head and states as Qwen3-Next has them."""
    text = f"2 key heads, 4 heads, states of {STATE_SIZE} x {STATE_SIZE}, chunks of {CHUNK_SIZE}"
    problem = delta_problem(bfloat16_inputs(), 1, 1024, 2, 4, STATE_SIZE, text)
    yield CountedProblem(
        "delta_scan",
        problem,
        Goal("of the formula", problem.forward.bytes, 2.2),
        Goal("of the formula", problem.backward.bytes, 5),
    )


def launches() -> Iterator[KernelLaunch]:
    """Every kernel with gates and documents, for one and two steps per token."""
    import triton.language as tl

    from amfm.kernels.delta_scan import triton_impl as delta
    from amfm.kernels.delta_scan.triton_backward import gradients_kernel, walk_back_kernel
    from amfm.kernels.delta_scan.triton_forward import chunk_state_kernel, prepare_kernel

    types = _types()
    gates, whole = {"GATE": True, "DOCUMENTS": True}, {"BLOCK_K": STATE_SIZE}
    outputs = {"INITIAL": False, "initial": None, "OUTPUT": True, "SAVE": False, "entering": None, "errors": None}
    states = {"INITIAL": False, "initial": None, "OUTPUT": False, "SAVE": True, "o": None}
    kernels = (
        ("prepare", prepare_kernel, gates | whole | {"PRECISION": "tf32"}, delta.PREPARE[0]),
        ("walk", chunk_state_kernel, outputs | whole, delta.WALK[0]),
        ("walk, states only", chunk_state_kernel, states | whole, delta.STATES_WALK[0]),
        ("walk back", walk_back_kernel, {"D_FINAL": False, "d_final": None} | whole, delta.WALK_BACK[0]),
    )
    chunk = DELTA_LIMITS.chunk_sizes[-1]
    for steps in (1, 2):
        common = {"Q": chunk, "QT": chunk // steps, "N": steps, "DOT": tl.bfloat16}
        gradients = ("gradients", gradients_kernel, gates, delta.gradient_candidates(steps)[0])
        for name, kernel, special, config in (*kernels, gradients):
            label = f"delta {name}, {steps} {'step' if steps == 1 else 'steps'} per token"
            yield kernel_launch(label, kernel, types, common | special, config)
    yield from _channel_launches(types)


def _types() -> dict[str, str]:
    """Triton's type of each argument.

    Shared by the kernels of both kinds of gate; arguments have one name throughout.
    """
    wide = [
        "q",
        "k",
        "v",
        "o",
        "d_o",
        "d_q",
        "d_k",
        "d_v",
        "inverse",
        "scores",
        "entering",
        "leaving",
        "errors",
        "erase",
        "d_erase",
    ]
    wide += ["q_start", "k_start", "k_end", "by_read", "by_found"]
    floats = ["beta", "g", "enter", "leave", "carry", "decay", "initial", "final"]
    floats += ["d_final", "d_initial", "d_beta", "d_g"]
    types = dict.fromkeys(wide, "*bf16") | dict.fromkeys(floats, "*fp32") | {"firsts": "*i32"}
    strides = [f"stride_{name}{dim}" for name in "qkv" for dim in "btn"]
    return types | dict.fromkeys(("T", "H", "K", "V", *strides), "i32:16") | dict.fromkeys(("R", "chunks"), "i32")


def _channel_launches(types: dict[str, str]) -> Iterator[KernelLaunch]:
    """Every kernel of gates of key channels."""
    import triton.language as tl

    from amfm.kernels.delta_scan.vector import triton_backward as backward
    from amfm.kernels.delta_scan.vector import triton_impl as vector
    from amfm.kernels.delta_scan.vector.triton_forward import vector_prepare_kernel, vector_walk_kernel

    chunk = VECTOR_DELTA_LIMITS.chunk_sizes[-1]
    common, keys = {"Q": chunk, "DOT": tl.bfloat16}, {"ERASE": False, "erase": None}
    halved = {"LEVELS": chunk.bit_length() - 1, "DOCUMENTS": True}
    whole, largest = {"BLOCK_K": STATE_SIZE}, {"BLOCK_K": VECTOR_DELTA_LIMITS.key_dim}
    walk, walk_largest = (vector.walk_candidates(rows["BLOCK_K"])[0] for rows in (whole, largest))
    outputs = {"INITIAL": False, "initial": None, "OUTPUT": True, "SAVE": False, "entering": None, "errors": None}
    states = {"INITIAL": False, "initial": None, "OUTPUT": False, "SAVE": True, "o": None}
    back = {"D_FINAL": False, "d_final": None}
    kernels: tuple[tuple[str, Any, dict[str, Any], Config], ...] = (
        ("prepare", vector_prepare_kernel, halved | keys | {"PRECISION": "tf32"}, vector.PREPARE[0]),
        ("prepare, erase", vector_prepare_kernel, halved | {"ERASE": True, "PRECISION": "tf32"}, vector.PREPARE[0]),
        ("walk", vector_walk_kernel, outputs | whole, walk),
        ("walk, states only", vector_walk_kernel, states | whole, walk),
        ("walk back", backward.vector_walk_back_kernel, back | whole, walk),
        ("walk, K = 256", vector_walk_kernel, outputs | largest, walk_largest),
        ("walk back, K = 256", backward.vector_walk_back_kernel, back | largest, walk_largest),
        ("gradients of pairs", backward.vector_pairs_kernel, {}, vector.PAIRS[0]),
        ("gradients", backward.vector_gradients_kernel, halved | keys | {"d_erase": None}, vector.GRADIENTS[0]),
        ("gradients, erase", backward.vector_gradients_kernel, halved | {"ERASE": True}, vector.GRADIENTS[0]),
    )
    for name, kernel, special, config in kernels:
        yield kernel_launch(f"delta of channels {name}", kernel, types, common | special, config)


def trials() -> Iterator[Sized]:
    """Gated DeltaNet, DeltaProduct and Kimi Delta Attention."""
    from amfm.kernels.delta_scan.op import delta_scan

    def delta_trial(
        inputs: Inputs, tokens: int, key_heads: int, heads: int, *, steps: int = 1, key: int = 128, value: int = 128,
        channels: bool = False, erases: bool = False, lengths: tuple[int, ...] = (), initial: bool = False, exact: str = "reference",
    ) -> Trial:  # fmt: skip
        T, G, H, N = tokens, key_heads, heads, steps
        keys = F.normalize(torch.randn(1, T, N, G, key, device=inputs.device), dim=-1)
        leaves = {"q": inputs.normal(1, T, G, key, scale=key**-0.5), "k": keys.to(inputs.dtype).requires_grad_()}
        leaves |= {"v": inputs.normal(1, T, N, H, value), "beta": inputs.uniform(1, T, N, H)}
        leaves["g"] = inputs.uniform(1, T, H, *((key,) if channels else ()), low=-0.5, high=0.0)
        if erases:
            leaves["erase"] = inputs.normal(1, T, H, key, scale=key**-0.5)
        if initial:
            leaves["initial"] = inputs.normal(1, H, key, value, dtype=torch.float32)
        ids = documents(inputs, T, *lengths) if lengths else None

        def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
            out = delta_scan(
                *(given[name] for name in ("q", "k", "v", "beta", "g")), document_ids_BT=ids,
                initial_state_BHKV=given.get("initial"), erase_BTHK=given.get("erase"), backend=backend,
            )  # fmt: skip
            return {"o": out.o_BTHV, "final state": out.final_state_BHKV}

        return Trial(leaves, run, exact=exact)

    with_documents = partial(delta_trial, tokens=130, lengths=(64, 1, 65), initial=True)
    yield Sized("gated, with documents", "first", partial(with_documents, key_heads=1, heads=2))
    yield Sized(
        "gates of channels, with documents", "first", partial(with_documents, key_heads=2, heads=2, channels=True)
    )
    yield Sized("erase by channel", "first", partial(with_documents, key_heads=2, heads=2, channels=True, erases=True))
    yield Sized("two steps per token", "small", partial(delta_trial, tokens=50, key_heads=1, heads=2, steps=2))
    yield Sized("uneven sizes", "small", partial(delta_trial, tokens=100, key_heads=2, heads=2, key=72, value=40))
    long = partial(delta_trial, tokens=8205, lengths=(4000, 1, 4204), exact="torch")
    yield Sized("16 key heads, 32 heads, documents", "long", partial(long, key_heads=16, heads=32))
    yield Sized("states of 256 x 128", "long", partial(long, key_heads=4, heads=4, key=256))
    yield Sized("gates of channels", "long", partial(long, key_heads=8, heads=8, channels=True))


def _on_card(inputs: Inputs, sizes: CardSizes) -> Problem:
    heads = sizes.attention_heads
    return delta_problem(inputs, 1, sizes.tokens, heads // 2, heads, sizes.attention_dim)


def _on_host(inputs: Inputs, sizes: HostSizes) -> Problem:
    heads, size = sizes.heads, sizes.head_dim
    text = f"{heads} heads x {size}, state {size}"
    return delta_problem(inputs, sizes.rows, sizes.tokens, heads, heads, size, text)


CASE = OperationCase(
    "delta_scan", launches, counted_problems, trials, on_card={"delta_scan": _on_card}, on_host={"delta_scan": _on_host}
)
