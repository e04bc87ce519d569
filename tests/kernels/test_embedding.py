"""Rows of an embedding table: the gradient that lands in a sum is the table that torch makes."""

from __future__ import annotations

import pytest
import torch

from amfm.kernels.common.weight_gradients import embedding
from tests.helpers.gradient_place import Place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_gradients_land_in_the_sum_and_rows_without_a_token_get_zeros(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(11, 6).to(dtype).requires_grad_()
    ids = torch.randint(0, 9, (2, 2, 63))  # tokens repeat, two rows have none
    grads = torch.randn(2, 2, 63, 6).to(dtype)
    wanted = torch.zeros(11, 6)
    place = Place.of(weight)
    for tokens, grad in zip(ids, grads, strict=True):
        rows = embedding(tokens, weight)
        assert torch.equal(rows, weight[tokens])
        rows.backward(grad)
        wanted += torch.zeros(11, 6).index_add(0, tokens.flatten(), grad.flatten(0, 1).float())
        assert weight.grad is None and torch.equal(place.sum, wanted)
