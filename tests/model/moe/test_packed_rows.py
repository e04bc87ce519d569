"""Rows that are sent to experts as codes: the same results bitwise by fp8_block, three quarters of the bytes."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from amfm.kernels.low_precision.formats import packed_width, quantize
from amfm.kernels.low_precision.packed_rows import pack_rows, unpack_rows
from amfm.kernels.low_precision.recipe import Recipe
from amfm.model.moe.by_rank import RowsByRank
from amfm.model.moe.dispatch import RowsBySlot
from amfm.model.moe.transfer import HeldExperts
from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks

TOKENS, MODEL, WIDTH, EXPERTS = 96, 144, 40, 4


def test_packed_rows_are_the_numbers_of_their_codes_and_stay_when_packed_again():
    x = torch.randn(37, 200, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 37)[:, None]
    x[3], x[4, 7] = 0.0, torch.nan
    found = torch.empty_like(x)
    unpack_rows(pack_rows(x), found)
    assert torch.equal(found.nan_to_num(7.0), quantize(x, "fp8_block").values().nan_to_num(7.0))
    again = torch.empty_like(x)
    unpack_rows(pack_rows(found), again)
    assert torch.equal(again.nan_to_num(7.0), found.nan_to_num(7.0))
    assert [packed_width(width) for width in (1, 128, 1024, 7168)] == [16, 144, 1040, 7232]


class Sent(TorchDispatchMode):
    """Counts the bytes of rows that are handed to all-to-alls."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._opname == "alltoall_base_" and args[1].shape[-1] in (MODEL, packed_width(MODEL)):
            self.bytes += args[1].nbytes
        return func(*args, **(kwargs or {}))


def dispatch_rows(cases):
    """Results, gradients and bytes of each case: class of rows, parts, dispatch."""
    parallel, found = initialize_parallel(ParallelConfig(expert=2), timeout_seconds=PATIENCE_SECONDS, num_threads=1), {}
    for kind, parts, dispatch in cases:
        generator = torch.Generator().manual_seed(parallel.rank)
        x = torch.randn(TOKENS, MODEL, generator=generator).bfloat16().requires_grad_()
        ids = torch.rand(TOKENS, EXPERTS, generator=generator).topk(2).indices
        weights = torch.rand(TOKENS, 2, generator=generator).requires_grad_()
        up, down = (torch.randn(EXPERTS // 2, *shape, generator=generator).mul(0.2).bfloat16().requires_grad_()
                    for shape in ((2 * WIDTH, MODEL), (MODEL, WIDTH)))  # fmt: skip
        up.recipe = down.recipe = Recipe("fp8_block", emulate=True, dispatch=dispatch)
        experts = HeldExperts(up, down, parallel.groups, "swiglu", "torch")
        slots = (TOKENS,) if kind is RowsBySlot else ()
        with Sent() as sent:
            rows = kind(x, ids, weights, experts, parts, *slots)
            for part in rows.parts:
                part.compute()
            y = rows.collect()
            y.backward(torch.randn(y.shape, generator=generator).to(y.dtype))
        found[kind.__name__, parts, dispatch] = [y.detach(), x.grad, weights.grad, up.grad, down.grad], sent.bytes
    return found


PARTS = [1, 2]


@pytest.fixture(scope="module")
def dispatched():
    kinds, dispatches = (RowsByRank, RowsBySlot), ("bf16", "fp8")
    return run_ranks(dispatch_rows, [*itertools.product(kinds, PARTS, dispatches)], num_ranks=2)


@pytest.mark.parametrize("parts", PARTS)
def test_rows_as_codes_change_no_bit_but_of_subnormal_numbers_in_weights_gradients(parts, dispatched):
    for kind in ("RowsByRank", "RowsBySlot"):
        for found in dispatched:
            packed, wide = (found[kind, parts, each][0] for each in ("fp8", "bf16"))
            assert all(torch.equal(ours, exact) for ours, exact in zip(packed[:3], wide[:3], strict=True))
            # Scales are powers of two: rounding along the tokens too moves only what is subnormal in one of both runs.
            for ours, exact in zip(packed[3:], wide[3:], strict=True):
                assert (ours.float() - exact.float()).norm() < 1e-3 * exact.float().norm()
        # There, and gradients there, in a byte and its part of a row's end; home in bfloat16.
        packed_bytes, wide_bytes = (
            sum(found[kind, parts, each][1] for found in dispatched) for each in ("fp8", "bf16")
        )
        assert packed_bytes * 4 * MODEL == wide_bytes * (packed_width(MODEL) + 2 * MODEL)
