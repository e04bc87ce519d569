"""Sums of parts that programs wrote."""

from __future__ import annotations

import torch

from amfm.kernels.common.tiles import grid_of, sum_first, sum_parts


def test_parts_are_added_in_float32_into_rows_that_lie_apart() -> None:
    parts = torch.randn(37, 3, 150, generator=torch.Generator().manual_seed(0))
    wide = torch.full((3, 200), 7.0, dtype=torch.bfloat16)
    sum_parts(parts, wide[:, 20:170])
    torch.testing.assert_close(wide[:, 20:170], parts.double().sum(0).to(torch.bfloat16), rtol=8e-3, atol=0)
    assert wide[:, :20].eq(7).all()
    assert wide[:, 170:].eq(7).all()
    torch.testing.assert_close(sum_first(parts, torch.float32), parts.double().sum(0).float(), rtol=1e-5, atol=1e-5)


def test_as_many_columns_as_there_may_be_routed_rows_are_a_grid_that_a_card_takes() -> None:
    """A million tokens of 22 choices; all dimensions of a grid but the first hold 65,535 programs."""
    grid = grid_of(1, 22 * 2**20)
    assert max(grid[1:], default=0) <= 65_535
