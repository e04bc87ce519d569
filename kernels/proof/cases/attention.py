"""Causal attention with grouped keys; on a card the torch backend is PyTorch's scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Iterator

from amfm.kernels.attention.op import attention, attention_bytes, attention_flops
from amfm.kernels.proof.cases.case import (
    CardSizes,
    CountedProblem,
    Inputs,
    KernelLaunch,
    Minimum,
    OperationCase,
    Problem,
    bfloat16_inputs,
    kernel_launch,
)


def attention_problem(inputs: Inputs, tokens: int, heads: int, kv_heads: int, size: int) -> Problem:
    """One row without documents.

    Leaves: q [1, T, H, K], k and v [1, T, J, K]. Operations count the pairs below the diagonal alone.
    """
    q = inputs.normal(1, tokens, heads, size)
    k, v = (inputs.normal(1, tokens, kv_heads, size) for _ in range(2))
    value_bytes = 2
    forward, backward = (
        Minimum(
            attention_bytes(1, tokens, heads, kv_heads, size, value_bytes, backward=way),
            attention_flops(1, tokens, heads, size, backward=way),
        )
        for way in (False, True)
    )
    return Problem(
        f"1x{tokens}, {heads} heads and {kv_heads} of keys x {size}",
        (q, k, v),
        lambda q, k, v, backend: attention(q, k, v, backend=backend),
        forward,
        backward,
    )


def counted_problems() -> Iterator[CountedProblem]:
    """A few tiles, some of them above the diagonal; no goal is set."""
    yield CountedProblem("attention", attention_problem(bfloat16_inputs(), 256, 4, 2, 64))


def launches() -> Iterator[KernelLaunch]:
    """All three kernels at the head sizes of presets, with documents: 256 is Qwen3-Next's, and what Kimi Linear's 192 fill.

    Sizes that 16 divides in every preset are declared so, as a launch on a card would find out.
    """
    import triton.language as tl

    from amfm.kernels.attention import triton_impl, triton_kernels

    types = dict.fromkeys(("q", "k", "v", "y", "d_y", "d_q", "d_k", "d_v"), "*bf16")
    types |= {"log_sums": "*fp32", "deltas": "*fp32", "first_keys": "*i32", "document_ends": "*i32"}
    types |= dict.fromkeys(("tokens", "keys", "heads", "size"), "i32:16") | {"kv_heads": "i32"}
    types |= {"scale": "fp32", "scale_log2": "fp32"}
    for size in (64, 128, 256):
        constants = {"DOCUMENTS": True, "DOT": tl.bfloat16, "BLOCK_K": size}
        for part, kernel, config in (
            ("forward", triton_kernels.attention_forward_kernel, triton_impl.forward_candidates(size)[0]),
            ("d_q", triton_kernels.attention_query_gradient_kernel, triton_impl.query_candidates(size)[0]),
            ("d_k d_v", triton_kernels.attention_key_gradient_kernel, triton_impl.key_candidates(size)[0]),
        ):
            yield kernel_launch(f"attention {part}, head {size}", kernel, types, constants, config)


def _on_card(inputs: Inputs, sizes: CardSizes) -> Problem:
    return attention_problem(inputs, sizes.tokens, sizes.attention_heads, sizes.kv_heads, sizes.attention_dim)


CASE = OperationCase("attention", launches, counted_problems, on_card={"attention": _on_card})
