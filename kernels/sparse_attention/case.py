"""Attention to chosen keys: DeepSeek's latents with all their heads, and grouped queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from amfm.kernels.cases.operation import KernelLaunch, OperationCase, kernel_launch
from amfm.kernels.cases.problem import CardSizes, CountedProblem, Inputs, Minimum, Problem, bfloat16_inputs
from amfm.kernels.cases.trial import Sized, Trial, documents
from amfm.kernels.sparse_attention.op import choose_keys, chosen_loss, sparse_attention, sparse_bytes, sparse_flops
from amfm.kernels.sparse_attention.rows import IndexRows

# Heads, key heads, channels of keys and of values; values of latents are the first channels of keys.
LATENTS, GROUPED = (128, 1, 576, 512), (32, 8, 128, None)
_INDEX_HEADS, _INDEX_SIZE = 4, 16


def _leaves(
    inputs: Inputs, tokens: int, keys: int, heads: int, kv_heads: int, size: int, value_size: int | None
) -> dict[str, Tensor]:
    """q [1, T, H, K], k [1, S, J, K], and v [1, S, J, K] unless values are the first channels of keys."""
    leaves = {"q": inputs.normal(1, tokens, heads, size), "k": inputs.normal(1, keys, kv_heads, size)}
    return leaves if value_size is not None else leaves | {"v": inputs.normal(1, keys, kv_heads, size)}


def _index(inputs: Inputs, tokens: int, keys: int) -> IndexRows:
    """Float32 rows of an indexer, whose choice is then the same in every dtype."""
    shapes = (1, tokens, _INDEX_HEADS, _INDEX_SIZE), (1, keys, _INDEX_SIZE), (1, tokens, _INDEX_HEADS)
    return IndexRows(*(inputs.normal(*shape, dtype=torch.float32) for shape in shapes))


def chosen_problem(
    inputs: Inputs, tokens: int, top_k: int, heads: int, kv_heads: int, size: int, value_size: int | None
) -> Problem:
    """One row without documents, whose keys are chosen beforehand. Leaves: q, k, and v unless values are of keys."""
    leaves = _leaves(inputs, tokens, tokens, heads, kv_heads, size, value_size)
    places = choose_keys(_index(inputs, tokens, tokens), top_k=top_k)

    def run(q: Tensor, k: Tensor, v: Tensor | int | None = value_size, *, backend: str) -> Tensor:
        assert v is not None
        return sparse_attention(q, k, v, places, scale=size**-0.5, backend=backend)[0]

    values = value_size or size
    pairs = tokens * top_k - top_k * (top_k - 1) // 2
    numbers = sum(leaf.numel() for leaf in leaves.values()) - leaves["q"].numel()
    forward, backward = (
        Minimum(
            sparse_bytes(leaves["q"].numel(), tokens * heads * values, numbers, tokens * top_k, 2, backward=way),
            sparse_flops(pairs, heads, size, values, backward=way),
        )
        for way in (False, True)
    )
    text = f"1x{tokens}, {top_k} chosen, {heads} heads and {kv_heads} of keys x {size}"
    return Problem(text, tuple(leaves.values()), run, forward, backward)


def counted_problems() -> Iterator[CountedProblem]:
    """Both forms; no goal is set."""
    yield CountedProblem("sparse_attention", chosen_problem(bfloat16_inputs(), 128, 32, 4, 2, 64, None))
    yield CountedProblem("sparse_attention", chosen_problem(bfloat16_inputs(), 64, 32, 32, 1, 80, 64))


def launches() -> Iterator[KernelLaunch]:
    """All kernels for latents and for grouped queries."""
    import triton.language as tl

    from amfm.kernels.sparse_attention import triton_impl, triton_kernels

    types = dict.fromkeys(("q", "k", "v", "d_o", "o", "d_q", "shares", "slopes"), "*bf16")
    types |= dict.fromkeys(("log_sums", "deltas", "mass", "pairs", "d_rows"), "*fp32")
    types |= {"rows": "*i64", "ends": "*i32", "order": "*i64", "offsets": "*i64", "num_keys": "i32", "kv_heads": "i32"}
    types |= dict.fromkeys(("slots", "heads", "size", "split", "width"), "i32:16")
    types |= dict.fromkeys(("value_size", "value_stride", "value_first"), "i32:16") | {"scale": "fp32"}
    types |= {"scale_log2": "fp32"}
    for text, (heads, kv_heads, size, value_size) in (("latents", LATENTS), ("grouped queries", GROUPED)):
        group, sizes = heads // kv_heads, triton_impl.Sizes(64, heads, kv_heads, size, value_size or size)
        constants: dict[str, Any] = {"DOT": tl.bfloat16, **sizes.forward_tiles(shared=value_size is not None)}
        constants |= {"v": None} if value_size is not None else {}
        for part, kernel, config in (
            ("forward", triton_kernels.chosen_forward_kernel, triton_impl.forward_candidates(group, size)[0]),
            ("weights", triton_kernels.chosen_weights_kernel, triton_impl.weight_candidates(group, size)[0]),
        ):
            given = {name: value for name, value in constants.items() if name in kernel.arg_names}
            yield kernel_launch(f"chosen keys {part}, {text}", kernel, types, given, config)
        for part, kernel, config in (
            ("slopes", triton_kernels.chosen_slopes_kernel, triton_impl.slope_candidates(group)[0]),
            ("d_q", triton_kernels.chosen_query_gradient_kernel, triton_impl.query_candidates(group)[0]),
            ("d_k d_v", triton_kernels.chosen_key_gradient_kernel, triton_impl.key_candidates(group)[0]),
        ):
            yield kernel_launch(f"chosen keys {part}, {text}", kernel, types, {"DOT": tl.bfloat16}, config)
    yield kernel_launch("chosen keys, sums of pairs", triton_kernels.sum_pairs_kernel, types, {}, triton_impl.SUM)


def chosen_trial(
    inputs: Inputs, tokens: int, top_k: int, heads: int, kv_heads: int, size: int, value_size: int | None = None, *,
    keys: int | None = None, lengths: tuple[int, ...] = (), exact: str = "reference",
) -> Trial:  # fmt: skip
    """Output, and the loss of an indexer, which tells the weights of the chosen keys; `keys` more than `tokens` are a cache."""
    keys = keys or tokens
    leaves = _leaves(inputs, tokens, keys, heads, kv_heads, size, value_size)
    index = _index(inputs, tokens, keys)
    ids = documents(inputs, keys, *lengths) if lengths else None
    places = choose_keys(index, top_k=top_k, document_ids_BS=ids)

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        q, k, *rest = (given[name] for name in leaves)
        v = rest[0] if rest else value_size
        assert v is not None
        o, mass = sparse_attention(q, k, v, places, scale=size**-0.5, backend=backend)
        rows = IndexRows(given["index q"], given["index k"], given["index weight"])
        return {"o": o, "loss": chosen_loss(rows, places, mass, backend=backend)}

    names = dict(zip(("index q", "index k", "index weight"), index))
    return Trial({**leaves, **names}, run, exact=exact)


def trials() -> Iterator[Sized]:
    """Tiles of production over few keys, documents, fewer keys than are chosen, a cache."""
    build = partial(chosen_trial, tokens=70, top_k=40, lengths=(30, 1, 39))
    yield Sized("latents with documents", "first", partial(build, heads=128, kv_heads=1, size=576, value_size=512))
    yield Sized("grouped queries with documents", "first", partial(build, heads=8, kv_heads=2, size=128))
    small = partial(chosen_trial, heads=4, kv_heads=2, size=20)
    yield Sized("a query behind a cache", "small", partial(small, tokens=1, keys=20, top_k=7))
    yield Sized("one token", "small", partial(small, tokens=1, top_k=7))
    uneven = partial(chosen_trial, tokens=63, top_k=80, heads=40, kv_heads=1, size=28, value_size=20)
    yield Sized("uneven latents, fewer keys than are chosen", "small", partial(uneven, lengths=(20, 43)))
    long = partial(chosen_trial, tokens=4109, top_k=512, heads=64, kv_heads=1, size=576, value_size=512, exact="torch")
    yield Sized("long row with documents", "long", partial(long, lengths=(2000, 1, 63, 2045)))


def _on_card(inputs: Inputs, sizes: CardSizes, shape: tuple[int, int, int, int | None] | None = None) -> Problem:
    own = sizes.attention_heads, sizes.kv_heads, sizes.attention_dim, None
    return chosen_problem(inputs, sizes.tokens, max(1, sizes.tokens // 4), *(shape or own))


CASE = OperationCase(
    "sparse_attention",
    launches,
    counted_problems,
    trials,
    on_card={"sparse_attention": _on_card, "sparse_attention_latents": partial(_on_card, shape=LATENTS)},
)
