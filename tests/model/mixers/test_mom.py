"""How a mixture of memories takes tokens to their memories and back."""

from __future__ import annotations

import torch

from amfm.model.mixers.mom import sort_by_memory, take_tokens
from amfm.model.packing import PackMeta
from tests.helpers.numbers import assert_bitwise, assert_near

# The same few numbers added in another order.
FLOAT64 = 1e-14


def test_copies_are_the_tokens_and_gather_their_gradients() -> None:
    generator = torch.Generator().manual_seed(4)
    B, T, K = 2, 21, 3
    memory_BTK = torch.rand(B, T, 5, generator=generator).topk(K, dim=-1).indices
    order_BS = sort_by_memory(memory_BTK, PackMeta.one_document_a_row(B, T)).order_BS
    places_BTK = order_BS.argsort(1).unflatten(1, (T, K))
    wide_BTX = torch.randn(B, T, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    x_BTX = wide_BTX[..., 2:6]
    actual = take_tokens(x_BTX, order_BS // K, places_BTK)
    expected = x_BTX[torch.arange(B)[:, None], order_BS // K]
    assert_bitwise(actual, expected, "copies")
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    (actual_BTX,) = torch.autograd.grad((actual * weight).sum(), wide_BTX)
    (expected_BTX,) = torch.autograd.grad((expected * weight).sum(), wide_BTX)
    assert_near(actual_BTX, expected_BTX, FLOAT64, "gradient of the tokens")
