"""The norm of queries and keys and their rotation by position, in one kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from amfm.kernels.cases import (
    CountedProblem,
    Inputs,
    Minimum,
    OperationCase,
    Problem,
    Sized,
    bfloat16_inputs,
    each_pass,
)
from amfm.kernels.rope.op import qk_norm_rope, qk_norm_rope_bytes, qk_norm_rope_flops, rope_frequencies

VALUE_BYTES = 2


def rotation_problem(
    inputs: Inputs, tokens: int, heads: int, kv_heads: int, size: int, *, rotated: int = 0, norm: bool = True,
    joins: bool = False, exact: str = "reference",
) -> Problem:  # fmt: skip
    """Queries and keys, normed and rotated in their first `rotated` channels, or in all.

    Leaves: q [1, T, H, K], k [1, T, J, K] and, with `norm`, both weights [K]. `joins`: the results are joined along the heads,
    so that the first output is both.
    """
    frequencies, factor = rope_frequencies(rotated or size, theta=10000.0)
    frequencies, positions = frequencies.to(inputs.device), torch.arange(tokens, device=inputs.device)[None]
    leaves = {"q": inputs.normal(1, tokens, heads, size), "k": inputs.normal(1, tokens, kv_heads, size)}
    if norm:
        leaves |= {"q_weight": inputs.normal(size), "k_weight": inputs.normal(size)}

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        q, k = qk_norm_rope(
            given["q"], given["k"], positions, frequencies, factor, q_weight_K=given.get("q_weight"),
            k_weight_K=given.get("k_weight"), backend=backend,
        )  # fmt: skip
        return {"pair": torch.cat((q, k), dim=2)} if joins else {"q": q, "k": k}

    every = heads + kv_heads
    moved = partial(qk_norm_rope_bytes, tokens, every, size, VALUE_BYTES)
    least = each_pass(
        lambda back: Minimum(moved(backward=back), qk_norm_rope_flops(tokens, every, size, backward=back))
    )
    return Problem(leaves, run, f"1x{tokens}, {heads} + {kv_heads} heads x {size}", *least, exact=exact)


def counted_problems() -> Iterator[CountedProblem]:
    """No goal is set."""
    yield CountedProblem("qk_norm_rope", rotation_problem(bfloat16_inputs(), 256, 8, 2, 64, joins=True))


def trials() -> Iterator[Sized]:
    """With and without the norm of queries and keys; a part of the channels rotated."""
    yield Sized(
        "heads of 128 with norm",
        "first",
        partial(rotation_problem, tokens=40, heads=4, kv_heads=1, size=128, rotated=128),
    )
    yield Sized(
        "part of a head",
        "small",
        partial(rotation_problem, tokens=63, heads=3, kv_heads=3, size=24, rotated=16, norm=False),
    )
    long = partial(rotation_problem, tokens=8205, heads=32, kv_heads=8, size=128, exact="torch")
    yield Sized("long row", "long", partial(long, rotated=128))


CASE = OperationCase("rope", counted_problems, trials)
