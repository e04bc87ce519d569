"""LightNet's running softmax over rows longer than a block, where the suite over all mixers has short ones."""

from __future__ import annotations

import pytest
import torch
from amfm_mixers.vector_gates import BLOCK_TOKENS, documents_logcumsumexp

# Documents that end at, before and after ends of blocks, one over several blocks; and rows that end in a block.
LENGTHS = (BLOCK_TOKENS, 1, BLOCK_TOKENS - 1, 3 * BLOCK_TOKENS + 5, 7)


def summed(x_BTX: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """Document by document, by torch's own scan."""
    return torch.cat([part.logcumsumexp(dim=1) for part in x_BTX.split(lengths, dim=1)], dim=1)


@pytest.mark.parametrize("lengths", [LENGTHS, (sum(LENGTHS),), (BLOCK_TOKENS + 1,), (5, 9)])
def test_sums_over_blocks_are_those_of_each_document(lengths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    # Sizes that no sum of plain powers holds.
    x_BTX = 300 * torch.randn(2, sum(lengths), 3, dtype=torch.float64, generator=generator)
    weights_BTX = torch.randn(x_BTX.shape, dtype=torch.float64, generator=generator)
    ids_BT = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(2, -1)
    ids = ids_BT if len(lengths) > 1 else None
    found, expected = x_BTX.clone().requires_grad_(), x_BTX.clone().requires_grad_()
    result, reference = documents_logcumsumexp(found, ids), summed(expected, lengths)
    torch.testing.assert_close(result, reference, rtol=1e-12, atol=1e-12)
    (result * weights_BTX).sum().backward()
    (reference * weights_BTX).sum().backward()
    # torch sums positive and negative gradients apart, as powers, which costs it digits.
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-9)
