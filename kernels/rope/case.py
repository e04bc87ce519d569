"""The norm of queries and keys and their rotation by position, in one kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from amfm.kernels.cases.operation import KernelLaunch, OperationCase, kernel_launch
from amfm.kernels.cases.problem import CountedProblem, Inputs, Minimum, Problem, bfloat16_inputs
from amfm.kernels.cases.trial import Sized, Trial
from amfm.kernels.rope.op import qk_norm_rope, qk_norm_rope_bytes, qk_norm_rope_flops, rope_frequencies

VALUE_BYTES = 2


def rotation_problem(inputs: Inputs, tokens: int, heads: int, kv_heads: int, size: int) -> Problem:
    """Queries and keys, normed and rotated, joined along the heads.

    Leaves: q [1, T, H, K], k [1, T, J, K] and both weights [K]. Joined, because the result of a problem is one
    tensor.
    """
    frequencies, factor = rope_frequencies(size, theta=10000.0)
    frequencies, positions = frequencies.to(inputs.device), torch.arange(tokens, device=inputs.device)[None]

    def run(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, backend: str) -> Tensor:
        pair = qk_norm_rope(
            q, k, positions, frequencies, factor, q_weight_K=q_weight, k_weight_K=k_weight, backend=backend
        )
        return torch.cat(pair, dim=2)

    forward, backward = (
        Minimum(
            qk_norm_rope_bytes(tokens, heads + kv_heads, size, VALUE_BYTES, backward=way),
            qk_norm_rope_flops(tokens, heads + kv_heads, size, backward=way),
        )
        for way in (False, True)
    )
    q, k = (inputs.normal(1, tokens, number, size) for number in (heads, kv_heads))
    leaves = (q, k, inputs.normal(size), inputs.normal(size))
    return Problem(f"1x{tokens}, {heads} + {kv_heads} heads x {size}", leaves, run, forward, backward)


def counted_problems() -> Iterator[CountedProblem]:
    """No goal is set."""
    yield CountedProblem("qk_norm_rope", rotation_problem(bfloat16_inputs(), 256, 8, 2, 64))


def launches() -> Iterator[KernelLaunch]:
    """Both kernels, for heads of 128, and for those of 256 of which 64 channels rotate (Qwen3-Next)."""
    from amfm.kernels.rope import triton_impl as rope

    types = dict.fromkeys(("x", "y", "d_y", "d_x", "weight"), "*bf16")
    types |= dict.fromkeys(("cosine", "sine", "d_weight"), "*fp32")
    types |= dict.fromkeys(("rows", "heads", "size", "half"), "i32:16") | {"epsilon": "fp32"}
    for label, half, rest in (("", 64, 0), (", heads of 256", 32, 192)):
        constants = {"NORM": True, "ROTATE": True} | rope.tile_of(half, rest)
        yield kernel_launch(f"QK-norm and rotation forward{label}", rope.norm_rope_forward_kernel, types, constants)
        yield kernel_launch(f"QK-norm and rotation backward{label}", rope.norm_rope_backward_kernel, types, constants)


def trials() -> Iterator[Sized]:
    """With and without the norm of queries and keys; a part of the channels rotated."""

    def trial(
        inputs: Inputs, tokens: int, heads: int, kv_heads: int, size: int, *, rotated: int, norm: bool = True,
        exact: str = "reference",
    ) -> Trial:  # fmt: skip
        frequencies, factor = rope_frequencies(rotated, theta=10000.0)
        frequencies, positions = frequencies.to(inputs.device), torch.arange(tokens, device=inputs.device)[None]
        leaves = {"q": inputs.normal(1, tokens, heads, size), "k": inputs.normal(1, tokens, kv_heads, size)}
        if norm:
            leaves |= {"q_weight": inputs.normal(size), "k_weight": inputs.normal(size)}

        def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
            q, k = qk_norm_rope(
                given["q"], given["k"], positions, frequencies, factor, q_weight_K=given.get("q_weight"),
                k_weight_K=given.get("k_weight"), backend=backend,
            )  # fmt: skip
            return {"q": q, "k": k}

        return Trial(leaves, run, exact=exact)

    yield Sized(
        "heads of 128 with norm", "first", partial(trial, tokens=40, heads=4, kv_heads=1, size=128, rotated=128)
    )
    yield Sized(
        "part of a head", "small", partial(trial, tokens=63, heads=3, kv_heads=3, size=24, rotated=16, norm=False)
    )
    long = partial(trial, tokens=8205, heads=32, kv_heads=8, size=128, exact="torch")
    yield Sized("long row", "long", partial(long, rotated=128))


CASE = OperationCase("rope", launches, counted_problems, trials)
