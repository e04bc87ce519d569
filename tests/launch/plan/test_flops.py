"""FLOPs that a trace counts for our kernels, against pairs counted one by one and products counted in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from amfm_simulate.values import KnownValues
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode

from amfm.kernels.attention.triton_impl import attention_triton
from amfm.kernels.delta_scan.op import delta_flops
from amfm.kernels.delta_scan.vector import triton_impl as delta_vector
from amfm.kernels.sparse_attention.triton_impl import sparse_attention_triton
from amfm.launch.plan.flops import count_flops

HEADS, SIZE, LENGTHS = 4, 16, (37, 1, 26)


class Counted(TorchDispatchMode):
    """FLOPs of all operations on fake tensors, by name; integers made from the host's are known."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.flops = KnownValues(), dict[str, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.values.follow(func, args, kwargs, out)
        self.flops[func._opname] = count_flops(func, args, kwargs, out, self.values.read)
        return out


def count_pairs(window: int | None, first_query: int = 0) -> int:
    """Queries and keys that meet, of the tokens from `first_query` on."""
    ids = [number for number, length in enumerate(LENGTHS) for _ in range(length)]
    return sum(
        ids[i] == ids[j] and (window is None or i - j < window)
        for i in range(first_query, len(ids))
        for j in range(i + 1)
    )


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("first_query", [0, 21])
def test_attention_counts_the_keys_that_documents_and_windows_leave(window: int | None, first_query: int) -> None:
    tokens = sum(LENGTHS)
    with FakeTensorMode(allow_non_fake_inputs=True), Counted() as counted:
        q, k, v = (torch.randn(2, tokens - start, HEADS, SIZE, requires_grad=True) for start in (first_query, 0, 0))
        ids_BS = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS), output_size=tokens).expand(2, -1)
        attention_triton(q, k, v, ids_BS, SIZE**-0.5, window).sum().backward()
    pairs = 2 * count_pairs(window, first_query) * HEADS * SIZE
    assert counted.flops["attention_triton"] == 4 * pairs
    assert counted.flops["attention_triton_backward"] == 10 * pairs


def test_attention_to_chosen_keys_counts_those_that_queries_see() -> None:
    tokens, keys, top_k, value = 20, 24, 9, 12
    with FakeTensorMode(), Counted() as counted:
        q, k = (torch.randn(2, length, heads, SIZE, requires_grad=True) for length, heads in ((tokens, 4), (keys, 1)))
        places = torch.zeros(2, tokens, top_k, dtype=torch.int64)
        sparse_attention_triton(q, k, None, places, 0.25, value)[0].sum().backward()
    pairs = 2 * sum(min(top_k, seen) for seen in range(keys - tokens + 1, keys + 1)) * HEADS
    assert counted.flops["sparse_attention_triton"] == pairs * 2 * (SIZE + value)
    assert counted.flops["sparse_attention_triton_backward"] == pairs * 2 * (3 * SIZE + 2 * value)


@pytest.mark.parametrize("window", [None, 9])
def test_pytorchs_attention_over_documents_counts_the_same(window: int | None) -> None:
    ends = [0, 37, 38, 64]
    with FakeTensorMode(allow_non_fake_inputs=True), Counted() as counted:
        q, k, v = (torch.randn(64, HEADS, SIZE, dtype=torch.bfloat16) for _ in range(3))
        offsets = torch.tensor(ends, dtype=torch.int32)
        size = (-1 if window is None else window - 1, 0)
        varlen_attn(q, k, v, offsets, offsets, 37, 37, window_size=size)
    assert counted.flops["_varlen_attn"] == 4 * count_pairs(window) * HEADS * SIZE


@pytest.mark.parametrize("erases", [False, True])
def test_the_delta_rule_with_channel_gates_counts_as_the_other_with_a_key_head_a_head(erases: bool) -> None:
    with FakeTensorMode(), Counted() as counted:
        q, k, v, erase = (torch.randn(2, 40, HEADS, size, requires_grad=True) for size in (SIZE, SIZE, 8, SIZE))
        beta, g = torch.rand(2, 40, HEADS, requires_grad=True), -torch.rand(2, 40, HEADS, SIZE)
        given = erase if erases else None
        delta_vector._forward(q, k, v, beta, g.requires_grad_(), given, None, None, 16)[0].sum().backward()
    sizes = (2, 40, 1, HEADS, HEADS, SIZE, 8)
    assert counted.flops["delta_vector_triton"] == delta_flops(*sizes, chunk_size=16)
    assert counted.flops["delta_vector_triton_backward"] == delta_flops(*sizes, chunk_size=16, backward=True)
