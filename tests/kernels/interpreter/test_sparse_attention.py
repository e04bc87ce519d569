"""The Triton kernels of attention to chosen keys in the interpreter against dense attention with all other keys masked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from amfm.kernels.sparse_attention import triton_impl
from amfm.kernels.sparse_attention.op import choose_keys, sparse_attention
from tests.helpers.numbers import assert_all_near
from tests.helpers.registration import assert_registered
from tests.kernels.test_sparse_attention import make_heads, make_ids, make_rows
from tests.kernels.twice import Twice

FLOAT32 = 1e-5  # softmax-weighted sums of at most a hundred values


def run(shape: tuple, backend: str, dtype: torch.dtype, *, of_keys: bool) -> list[Tensor]:
    """Output, weights, largest log-sum-exps and gradients; `of_keys`: values are channels of keys."""
    tokens, keys, heads, kv_heads, size, value, top_k, lengths = shape
    places = choose_keys(make_rows(tokens, keys), top_k=top_k, document_ids_BS=make_ids(lengths))
    leaves = [x.to(dtype).requires_grad_() for x in make_heads(tokens, keys, heads, kv_heads, size, value)]
    q, k, v = leaves
    highest = torch.full((heads,), -torch.inf, dtype=dtype)
    values = value if of_keys else v
    o, mass = sparse_attention(q, k, values, places, scale=0.4, highest_H=highest, backend=backend)
    weight = torch.randn(o.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(dtype)
    return [o, mass, highest, *torch.autograd.grad((o * weight).sum(), leaves[: 2 if of_keys else 3])]


@pytest.mark.parametrize(
    ("shape", "of_keys"),
    [
        ((1, 1, 4, 2, 8, 8, 3, None), False),
        ((11, 11, 4, 2, 8, 8, 5, (3, 1, 7)), False),
        ((4, 31, 20, 1, 20, 12, 19, (12, 1, 18)), True),
        pytest.param((3, 40, 2, 2, 20, 6, 64, (30, 10)), False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_kernels_equal_the_definition_twice_bitwise(
    shape: tuple, of_keys: bool, monkeypatch: pytest.MonkeyPatch, twice: Twice, poisoned_memory: None
) -> None:
    monkeypatch.setattr(triton_impl, "_NUMBERS", 5000)  # blocks of a few queries
    once = twice(lambda: run(shape, "triton", torch.float32, of_keys=of_keys))
    assert_all_near(once, run(shape, "reference", torch.float64, of_keys=of_keys), FLOAT32)


def test_places_without_a_key_may_stand_anywhere() -> None:
    q, k, v = (x.float() for x in make_heads(2, 20, 2, 1, 8, 8))
    places = torch.tensor([[3, -1, 5, -1] + [-1] * 16 + [9, -1]]).expand(2, 2, -1)
    o, mass = sparse_attention(q, k, v, places, scale=0.4, backend="triton")
    kept = places[..., [0, 2, 20]]
    assert_all_near([o, mass[..., [0, 2, 20]]], [*sparse_attention(q, k, v, kept, scale=0.4)], FLOAT32)
    assert not mass[places < 0].any()


def test_registration_is_complete() -> None:
    q, k, v = (x.float().requires_grad_() for x in make_heads(3, 5, 2, 1, 4, 4))
    places = choose_keys(make_rows(3, 5), top_k=2)
    assert_registered(triton_impl._forward, q, k, v, places, 0.5, 4)
    assert_registered(triton_impl._forward, q, k, None, places, 0.5, 3)
