"""The delta rule: Gated DeltaNet as in Qwen3-Next (states of 128 x 128, one step per token) and its relatives.

Compiled ahead of time are also DeltaProduct with two steps per token, and Kimi Delta Attention as in Kimi Linear (a
gate of each of 128 key channels).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
)
from amfm.kernels.delta_scan.op import delta_bytes, delta_flops, delta_scan

CHUNK_SIZE, STATE_SIZE = 64, 128


def delta_problem(
    inputs: Inputs, tokens: int, key_heads: int, heads: int, *, rows: int = 1, text: str = "", steps: int = 1, key: int = 128,
    value: int = 128, channels: bool = False, erases: bool = False, lengths: tuple[int, ...] = (), initial: bool = False,
    exact: str = "reference",
) -> Problem:  # fmt: skip
    """Gated, `steps` a token, heads / key_heads value heads per key head; `text` describes heads and states.

    Leaves: q [B, T, G, K], k [B, T, N, G, K] of length 1, v [B, T, N, H, V], beta [B, T, N, H] and g [B, T, H], or with
    `channels` [B, T, H, K], the last two float32. The peer takes a key head for each head, so its call repeats them.
    """
    T, G, H, N, K = tokens, key_heads, heads, steps, key
    leaves = {"q": inputs.normal(rows, T, G, K, scale=K**-0.5)}
    leaves |= {"k": inputs.directions(rows, T, N, G, K).requires_grad_(), "v": inputs.normal(rows, T, N, H, value)}
    leaves["beta"] = inputs.uniform(rows, T, N, H)
    leaves["g"] = inputs.uniform(rows, T, H, *((K,) if channels else ()), low=-0.5, high=0.0)
    if erases:
        leaves["erase"] = inputs.normal(rows, T, H, K, scale=K**-0.5)
    if initial:
        leaves["initial"] = inputs.normal(rows, H, K, value, dtype=torch.float32)
    ids = documents(inputs, T, *lengths, rows=rows) if lengths else None

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        out = delta_scan(
            *(given[name] for name in ("q", "k", "v", "beta", "g")), document_ids_BT=ids,
            initial_state_BHKV=given.get("initial"), erase_BTHK=given.get("erase"), chunk_size=CHUNK_SIZE, backend=backend,
        )  # fmt: skip
        return {"o": out.o_BTHV, "final state": out.final_state_BHKV}

    def peers() -> dict[str, Compute]:
        theirs = find_package("fla.ops.gated_delta_rule")
        if theirs is None:
            return {}

        def fla(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
            queries, keys = (x.repeat_interleave(H // G, dim=2) for x in (q, k[:, :, 0]))
            return theirs.chunk_gated_delta_rule(queries, keys, v[:, :, 0], g, beta[:, :, 0], scale=1.0)[0]

        return {"fla": fla}

    shape = (rows, T, N, G, H, K, value)
    least = each_pass(
        lambda back: Minimum(
            delta_bytes(*shape, backward=back), delta_flops(*shape, chunk_size=CHUNK_SIZE, backward=back)
        )
    )
    text = text or f"{G} key heads, {H} heads, states of {K} x {value}"
    return Problem(leaves, run, f"{rows}x{T}, {text}", *least, peers, exact=exact)


def counted_problems() -> Iterator[CountedProblem]:
    """One row, with two value heads per key head and states as Qwen3-Next has them."""
    text = f"2 key heads, 4 heads, states of {STATE_SIZE} x {STATE_SIZE}, chunks of {CHUNK_SIZE}"
    problem = delta_problem(bfloat16_inputs(), 1024, 2, 4, text=text)
    yield CountedProblem(
        "delta_scan",
        problem,
        Goal("of the formula", problem.forward.bytes, 2.2),
        Goal("of the formula", problem.backward.bytes, 5),
    )


def trials() -> Iterator[Sized]:
    """Gated DeltaNet, DeltaProduct and Kimi Delta Attention."""
    with_documents = partial(delta_problem, tokens=130, lengths=(64, 1, 65), initial=True)
    yield Sized("gated, with documents", "first", partial(with_documents, key_heads=1, heads=2))
    yield Sized(
        "gates of channels, with documents", "first", partial(with_documents, key_heads=2, heads=2, channels=True)
    )
    yield Sized("erase by channel", "first", partial(with_documents, key_heads=2, heads=2, channels=True, erases=True))
    yield Sized("two steps per token", "small", partial(delta_problem, tokens=50, key_heads=1, heads=2, steps=2))
    yield Sized("uneven sizes", "small", partial(delta_problem, tokens=100, key_heads=2, heads=2, key=72, value=40))
    long = partial(delta_problem, tokens=8205, lengths=(4000, 1, 4204), exact="torch")
    yield Sized("16 key heads, 32 heads, documents", "long", partial(long, key_heads=16, heads=32))
    yield Sized("states of 256 x 128", "long", partial(long, key_heads=4, heads=4, key=256))
    yield Sized("gates of channels", "long", partial(long, key_heads=8, heads=8, channels=True))


def _on_gpu(inputs: Inputs, sizes: GpuSizes) -> Problem:
    heads = sizes.attention_heads
    return delta_problem(inputs, sizes.tokens, heads // 2, heads, key=sizes.attention_dim, value=sizes.attention_dim)


def _on_host(inputs: Inputs, sizes: HostSizes) -> Problem:
    heads, size = sizes.heads, sizes.head_dim
    text = f"{heads} heads x {size}, state {size}"
    return delta_problem(inputs, sizes.tokens, heads, heads, rows=sizes.rows, text=text, key=size, value=size)


CASE = OperationCase(
    "delta_scan", counted_problems, trials, on_gpu={"delta_scan": _on_gpu}, on_host={"delta_scan": _on_host}
)
