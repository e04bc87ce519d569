"""Weights quantised once per step: bitwise identical results, one pass over each, and nothing kept outside of the block."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from amfm.kernels.linear.op import linear
from amfm.kernels.low_precision import emulated
from amfm.kernels.low_precision.recipe import Recipe, keep_weights, made_once


def test_weights_are_quantised_once_in_a_block_with_the_same_bits(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, 40, generator=generator), torch.randn(24, 40, generator=generator).requires_grad_()
    weight.recipe = Recipe("nvfp4", seed=2)
    quantised = []
    quantize = emulated.quantize

    def note(matrix, name, *, weight=False, noise=None):
        quantised.extend([1] if weight else [])
        return quantize(matrix, name, weight=weight, noise=noise)

    monkeypatch.setattr(emulated, "quantize", note)

    def passes():
        weight.grad = None
        given = x.clone().requires_grad_()
        for _ in range(2):
            checkpoint(linear, given, weight, use_reentrant=False).sum().backward()
        return given.grad, weight.grad

    plain = passes()
    assert len(quantised) == 6, "forward, forward again and backward, of two passes"
    quantised.clear()
    with keep_weights():
        kept = passes()
    assert len(quantised) == 2, "one for each direction"
    assert all(map(torch.equal, plain, kept))
    with torch.no_grad():
        weight.mul_(3.0)
    with keep_weights():
        assert not torch.equal(passes()[0], plain[0])


def test_parts_of_a_stack_and_other_weights_are_told_apart_and_blocks_do_not_nest():
    stack = torch.zeros(2, 4, 4)
    with keep_weights():
        made = [made_once(matrix, "a", object) for matrix in (stack[0], stack[1], stack[0].t(), stack[0, :2])]
        assert len({id(each) for each in made}) == 4
        assert made_once(stack[0].detach(), "a", object) is made[0] and made_once(stack[0], "b", object) is not made[0]
        with pytest.raises(AssertionError, match="kept already"), keep_weights():
            pass
    assert made_once(stack[0], "a", object) is not made[0]
