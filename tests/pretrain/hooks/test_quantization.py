"""What quantising loses is counted as the formats define it."""

from __future__ import annotations

import pytest
import torch

from amfm.kernels.low_precision.recipe import Recipe, note_operands, watch_operands
from amfm.pretrain.hooks.quantization import Losses, count_losses, describe_losses


def test_small_numbers_beside_a_large_one_become_zero():
    row = torch.full((1, 128), 1e-3)
    row[0, 0] = 448.0  # the block's scale is 1, and e4m3's smallest number 2^-9
    row[0, 1] = 0.0
    numbers, zeroed, clamped, _, _ = count_losses(row, Recipe("fp8_block"), "input").tolist()
    assert (numbers, zeroed, clamped) == (127, 0, 0), "1e-3 rounds to 2^-9"
    row[0, 2:] = 9e-4
    assert count_losses(row, Recipe("fp8_block"), "input").tolist()[:2] == [127, 126]


def test_numbers_beyond_the_largest_code_are_clamped_under_nvfp4():
    torch.manual_seed(0)
    x = torch.randn(64, 256)
    numbers, _, clamped, _, _ = count_losses(x, Recipe("nvfp4"), "input").tolist()
    assert 0 < clamped < numbers / 16, "at most the largest number of each block, where its scale was rounded down"
    assert count_losses(x, Recipe("fp8_block"), "input").tolist()[2] == 0, "scales of powers of two are rounded up"


def test_errors_of_normal_numbers_are_those_of_the_formats():
    torch.manual_seed(0)
    losses = Losses({1: "M in_proj", 2: "M out_proj"})
    with watch_operands(losses.note):
        note_operands(Recipe("mxfp8", seed=1), input=torch.randn(64, 256), weight=torch.randn(32, 256))
        note_operands(Recipe("nvfp4", seed=2), gradient=torch.full((4, 16), torch.nan))
        note_operands(Recipe("nvfp4", seed=3), input=torch.randn(4, 16))
    note_operands(Recipe("mxfp8", seed=1), input=torch.randn(64, 256) * 1e9)
    found = describe_losses(
        losses.stacked(["M in_proj", "M out_proj"], torch.device("cpu")), ["M in_proj", "M out_proj"]
    )
    # e4m3 keeps three bits behind the leading one: errors are uniform within 2^-4 of a number, 2.7% in the mean.
    assert found["error"] == {
        "M in_proj input": pytest.approx(0.027, rel=0.1),
        "M in_proj weight": pytest.approx(0.027, rel=0.1),
    }
    assert found["clamped"] == {"M in_proj input": 0, "M in_proj weight": 0}
