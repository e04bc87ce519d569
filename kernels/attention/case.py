"""Causal attention with grouped keys; on a GPU the torch backend is PyTorch's scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from amfm.kernels.attention.op import attention, attention_bytes, attention_flops, fastest_backend
from amfm.kernels.attention.varlen import DocumentEnds
from amfm.kernels.cases import (
    CountedProblem,
    GpuSizes,
    Inputs,
    Minimum,
    OperationCase,
    Problem,
    Sized,
    bfloat16_inputs,
    documents,
    each_pass,
)

VALUE_BYTES = 2


def attention_problem(
    inputs: Inputs, tokens: int, heads: int, kv_heads: int, size: int, *, keys: int | None = None,
    lengths: tuple[int, ...] = (), window: int | None = None, sinks: bool = False, exact: str = "reference",
) -> Problem:  # fmt: skip
    """One row of causal attention; `keys` more than `tokens` are a cache before the queries.

    Leaves: q [1, T, H, K], k and v [1, S, J, K], sinks [H] if there are any. Operations count only the pairs below the
    diagonal.
    """
    keys = keys or tokens
    leaves = {"q": inputs.normal(1, tokens, heads, size)}
    leaves |= {name: inputs.normal(1, keys, kv_heads, size) for name in ("k", "v")}
    leaves |= {"sinks": inputs.normal(heads)} if sinks else {}
    ids = documents(inputs, keys, *lengths) if lengths else None

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        q, k, v, *rest = given.values()
        sinks_H = rest[0] if rest else None
        return {"y": attention(q, k, v, sinks_H=sinks_H, document_ids_BS=ids, window=window, backend=backend)}

    moved = partial(attention_bytes, 1, tokens, heads, kv_heads, size, VALUE_BYTES)
    least = each_pass(
        lambda back: Minimum(moved(backward=back), attention_flops(1, tokens, heads, size, backward=back))
    )
    text = f"1x{tokens}, {heads} heads and {kv_heads} of keys x {size}"
    return Problem(leaves, run, text, *least, exact=exact)


def counted_problems() -> Iterator[CountedProblem]:
    """A few tiles, some of them above the diagonal; no goal is set."""
    yield CountedProblem("attention", attention_problem(bfloat16_inputs(), 256, 4, 2, 64))


def packed_problem(
    inputs: Inputs, heads: int, kv_heads: int, size: int, *, lengths: tuple[int, ...], window: int | None = None
) -> Problem:
    """Documents as a model has them, by what is fastest for them: on a GPU PyTorch's variable-length attention."""
    tokens = sum(lengths)
    leaves = {"q": inputs.normal(1, tokens, heads, size)}
    leaves |= {name: inputs.normal(1, tokens, kv_heads, size) for name in ("k", "v")}
    ids = documents(inputs, tokens, *lengths)
    offsets = torch.tensor([0, *lengths], device=inputs.device).cumsum(0).to(torch.int32)
    ends = DocumentEnds(offsets, max(lengths))

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        q, k, v = given.values()
        chosen = fastest_backend(backend, q, has_documents=True, keys=tokens, document_ends=ends)
        y = attention(q, k, v, document_ids_BS=ids, window=window, document_ends=ends, backend=chosen)
        return {"y": y}

    return Problem(leaves, run)


def trials() -> Iterator[Sized]:
    """Heads of 64 and 128, documents, windows, a cache."""
    for size in (64, 128):
        build = partial(attention_problem, tokens=200, heads=2, kv_heads=1, size=size, lengths=(70, 1, 129))
        yield Sized(f"head {size} with documents", "first", build)
        yield Sized(f"head {size} with documents and sinks", "first", partial(build, sinks=True))
    yield Sized(
        "a query behind a cache", "small", partial(attention_problem, tokens=1, heads=4, kv_heads=2, size=8, keys=20)
    )
    yield Sized("uneven head", "small", partial(attention_problem, tokens=63, heads=2, kv_heads=2, size=20))
    windowed = partial(attention_problem, tokens=35, keys=70, heads=2, kv_heads=1, size=16, lengths=(20, 30, 19, 1))
    yield Sized("window and cache", "small", partial(windowed, window=18))
    yield Sized("window and cache, sinks", "small", partial(windowed, window=18, sinks=True))
    packed = partial(packed_problem, heads=4, kv_heads=2, size=64, lengths=(40, 1, 29))
    yield Sized("documents as a model has them", "small", packed)
    yield Sized("documents as a model has them, with a window", "small", partial(packed, window=13))
    long = partial(attention_problem, tokens=8205, heads=3, kv_heads=1, size=128, exact="torch")
    yield Sized("long row with documents", "long", partial(long, lengths=(4000, 1, 63, 4141)))
    yield Sized("long row with a window", "long", partial(long, window=1000))


def _on_gpu(inputs: Inputs, sizes: GpuSizes) -> Problem:
    return attention_problem(inputs, sizes.tokens, sizes.attention_heads, sizes.kv_heads, sizes.attention_dim)


CASE = OperationCase("attention", counted_problems, trials, on_gpu={"attention": _on_gpu})
