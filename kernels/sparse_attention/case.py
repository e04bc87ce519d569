"""Attention to chosen keys: DeepSeek's latents with all their heads, and grouped queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

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
from amfm.kernels.sparse_attention.op import choose_keys, chosen_loss, sparse_attention, sparse_bytes, sparse_flops
from amfm.kernels.sparse_attention.reference import IndexRows

# Heads, key heads, channels of keys and of values, which are the first channels of keys.
LATENTS = (128, 1, 576, 512)
_INDEX_HEADS, _INDEX_SIZE = 4, 16
_INDEX_NAMES = ("index q", "index k", "index weight")


def chosen_problem(
    inputs: Inputs, tokens: int, top_k: int, heads: int, kv_heads: int, size: int, value_size: int | None = None, *,
    keys: int | None = None, lengths: tuple[int, ...] = (), has_loss: bool = False, exact: str = "reference",
) -> Problem:  # fmt: skip
    """One row, whose keys are chosen beforehand; `keys` more than `tokens` are a cache.

    Leaves: q [1, T, H, K], k [1, S, J, K], v [1, S, J, K] unless values are the first channels of keys, and with `has_loss` the
    rows of the indexer, for an output that is its loss, which tells the weights of the chosen keys. Those rows are float32, so
    that the choice is the same in every dtype.
    """
    keys = keys or tokens
    leaves = {"q": inputs.normal(1, tokens, heads, size), "k": inputs.normal(1, keys, kv_heads, size)}
    if value_size is None:
        leaves["v"] = inputs.normal(1, keys, kv_heads, size)
    shapes = (1, tokens, _INDEX_HEADS, _INDEX_SIZE), (1, keys, _INDEX_SIZE), (1, tokens, _INDEX_HEADS)
    index = IndexRows(*(inputs.normal(*shape, dtype=torch.float32) for shape in shapes))
    ids = documents(inputs, keys, *lengths) if lengths else None
    places = choose_keys(index, top_k=top_k, document_ids_BS=ids)
    numbers = sum(leaf.numel() for name, leaf in leaves.items() if name != "q")
    leaves |= dict(zip(_INDEX_NAMES, index)) if has_loss else {}

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        v = given.get("v", value_size)
        assert v is not None
        o, mass = sparse_attention(given["q"], given["k"], v, places, scale=size**-0.5, backend=backend)
        if not has_loss:
            return {"o": o}
        rows = IndexRows(*(given[name] for name in _INDEX_NAMES))
        return {"o": o, "loss": chosen_loss(rows, places, mass, backend=backend)}

    values = value_size or size
    pairs = tokens * top_k - top_k * (top_k - 1) // 2
    moved = partial(sparse_bytes, leaves["q"].numel(), tokens * heads * values, numbers, tokens * top_k, 2)
    least = each_pass(
        lambda back: Minimum(moved(backward=back), sparse_flops(pairs, heads, size, values, backward=back))
    )
    text = f"1x{tokens}, {top_k} chosen, {heads} heads and {kv_heads} of keys x {size}"
    return Problem(leaves, run, text, *least, exact=exact)


def counted_problems() -> Iterator[CountedProblem]:
    """Both forms; no goal is set."""
    yield CountedProblem("sparse_attention", chosen_problem(bfloat16_inputs(), 128, 32, 4, 2, 64, None))
    yield CountedProblem("sparse_attention", chosen_problem(bfloat16_inputs(), 64, 32, 32, 1, 80, 64))


def trials() -> Iterator[Sized]:
    """Tiles of production over few keys, documents, fewer keys than are chosen, a cache."""
    build = partial(chosen_problem, has_loss=True, tokens=70, top_k=40, lengths=(30, 1, 39))
    yield Sized("latents with documents", "first", partial(build, heads=128, kv_heads=1, size=576, value_size=512))
    yield Sized("grouped queries with documents", "first", partial(build, heads=8, kv_heads=2, size=128))
    small = partial(chosen_problem, has_loss=True, heads=4, kv_heads=2, size=20)
    yield Sized("a query behind a cache", "small", partial(small, tokens=1, keys=20, top_k=7))
    yield Sized("one token", "small", partial(small, tokens=1, top_k=7))
    uneven = partial(chosen_problem, has_loss=True, tokens=63, top_k=80, heads=40, kv_heads=1, size=28, value_size=20)
    yield Sized("uneven latents, fewer keys than are chosen", "small", partial(uneven, lengths=(20, 43)))
    long = partial(
        chosen_problem,
        has_loss=True,
        tokens=4109,
        top_k=512,
        heads=64,
        kv_heads=1,
        size=576,
        value_size=512,
        exact="torch",
    )
    yield Sized("long row with documents", "long", partial(long, lengths=(2000, 1, 63, 2045)))


def _on_gpu(inputs: Inputs, sizes: GpuSizes, shape: tuple[int, int, int, int | None] | None = None) -> Problem:
    own = sizes.attention_heads, sizes.kv_heads, sizes.attention_dim, None
    return chosen_problem(inputs, sizes.tokens, max(1, sizes.tokens // 4), *(shape or own))


CASE = OperationCase(
    "sparse_attention",
    counted_problems,
    trials,
    on_gpu={"sparse_attention": _on_gpu, "sparse_attention_latents": partial(_on_gpu, shape=LATENTS)},
)
