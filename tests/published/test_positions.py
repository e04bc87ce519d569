"""Rotary positions of bf16 rows keep the angles of float64, also far from the row's start."""

from __future__ import annotations

import torch

from amfm.kernels.rope.op import qk_norm_rope, rope_frequencies


def test_distant_positions_of_bf16_heads_turn_by_the_angles_of_float64() -> None:
    frequencies, factor = rope_frequencies(16, theta=10_000.0)
    x_BTHK = torch.randn(1, 4, 2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    positions_BT = torch.tensor([[1, 257, 15_963, 131_071]])
    found, _ = qk_norm_rope(x_BTHK, x_BTHK, positions_BT, frequencies, factor)
    angles = positions_BT.double()[..., None, None] * 10_000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    first, second = x_BTHK.double().chunk(2, dim=-1)
    expected = [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()]
    # The result is rounded to bf16; float32 angles of 131,071 radians are off by 0.008 at most.
    torch.testing.assert_close(found.double(), torch.cat(expected, dim=-1), rtol=2**-8, atol=0.03)
