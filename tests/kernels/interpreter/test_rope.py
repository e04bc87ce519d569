"""The Triton rotation with QK-norm in the interpreter against the pair-by-pair definition."""

import pytest
import torch

from amfm.kernels.rope import triton_impl
from amfm.kernels.rope.op import qk_norm_rope
from amfm.kernels.rope.triton_impl import BLOCK_HEADS, TILE_VALUES, tile_of
from tests.helpers.numbers import assert_all_near
from tests.helpers.registration import assert_registered
from tests.kernels.test_rope import run

FLOAT32 = 1e-6  # a handful of operations; weights' gradients sum a few hundred


@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 1},
        {"tokens": 33},
        {"tokens": 9, "fraction": 0.5},
        {"tokens": 9, "norm": False},
        {"tokens": 9, "rotate": False},
        {"tokens": 9, "norm": False, "fraction": 0.25, "heads": 3, "kv_heads": 3},
        {"tokens": 9, "size": 10, "fraction": 0.6},
    ],
)
def test_kernels_equal_the_definition_twice_bitwise(sizes, twice, poisoned_memory):
    once = twice(lambda: run("triton", torch.float32, **sizes))
    assert_all_near(once, run("reference", torch.float64, **sizes), FLOAT32)


def test_meta_tensors_pass_through():
    q, k = torch.empty(2, 5, 4, 8, device="meta"), torch.empty(2, 5, 2, 8, device="meta")
    positions, frequencies = torch.zeros(2, 5, dtype=torch.int64, device="meta"), torch.empty(4, device="meta")
    q_out, k_out = qk_norm_rope(q, k, positions, frequencies, 1.0, backend="triton")
    assert q_out.shape == q.shape and k_out.shape == k.shape


def test_registration_is_complete():
    x = torch.randn(1, 3, 2, 8, requires_grad=True)
    cosine, sine, weight = torch.randn(1, 3, 1, 4), torch.randn(1, 3, 1, 4), torch.randn(8, requires_grad=True)
    assert_registered(triton_impl._forward, x, cosine, sine, weight, 1e-5)


def test_a_program_takes_fewer_of_wider_heads() -> None:
    """32 heads of 256 of which 64 rotate spilled 5,000 bytes per thread on every GPU; the tile of heads of 128 spills
    none.
    """
    tile = tile_of(32, 192)
    assert tile["BLOCK"] * (2 * tile["HALF"] + tile["REST"]) <= TILE_VALUES
    assert tile_of(64, 0)["BLOCK"] == BLOCK_HEADS
