"""BiP's two steps are its formulas, the mask follows what the loss says, and what it leaves can be shrunk."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from amfm_bip.bip import BipMasks

from amfm.model.config.feed_forward import FeedForwardConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.inference.weights import Weights
from amfm.pretrain.pruning.shrink import logit_difference, shrink_weights

CONFIG = ModelConfig(
    pattern="--", vocab_size=16, hidden_size=8, feed_forward=FeedForwardConfig(hidden_size=6, activation="swiglu")
)
TOKENS, META = torch.arange(12)[None] % 16, PackMeta.one_document_a_row(1, 12)


def make_model() -> HybridModel:
    model = HybridModel(CONFIG, single_rank_groups(), seed=3).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return model


def loss(call):
    return call(TOKENS, META, TOKENS.roll(-1, 1)).loss.total / 12


def test_both_steps_are_their_formulas() -> None:
    model = make_model()
    masks = BipMasks(model, keep=0.5, gamma=0.7, rate=0.1)
    assert masks.mask().view(2, 6).sum(1).tolist() == [3, 3]
    # The same with a model whose channels are masked by hand.
    masked, m = make_model(), masks.mask().view(2, 6)
    with torch.no_grad():
        for block in range(2):
            masked.get_parameter(f"blocks.{block}.mixer.up_proj.weight").mul_(m[block].repeat(2)[:, None])
            masked.get_parameter(f"blocks.{block}.mixer.down_proj.weight").mul_(m[block])
    loss(masked).backward()
    expected = []
    for block in range(2):
        up, down = (f"blocks.{block}.mixer.{name}_proj.weight" for name in ("up", "down"))
        g_up, g_down = masked.get_parameter(up).grad, masked.get_parameter(down).grad
        straight = (model.get_parameter(up) * g_up).sum(1).view(2, 6).sum(0) + (model.get_parameter(down) * g_down).sum(
            0
        )
        squares = g_up.square().sum(1).view(2, 6).sum(0) + g_down.square().sum(0)
        expected.append(straight - m[block] * squares / 0.7)
    before, scores = {name: p.detach().clone() for name, p in model.named_parameters()}, masks.scores.clone()
    gradient = masks.upper_step(loss)
    torch.testing.assert_close(gradient, torch.cat(expected).detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(masks.scores, scores - 0.1 * gradient)
    masks.scores.copy_(scores)
    masks.lower_step(loss, torch.optim.SGD(model.parameters(), lr=0.01))
    for name, parameter in model.named_parameters():
        step = masked.get_parameter(name).grad
        if name in masks.plan.groupings:
            step = step * masks._spread(name, masks.mask()) + 0.7 * before[name]
        torch.testing.assert_close(parameter.detach(), before[name] - 0.01 * step, rtol=1e-10, atol=1e-12)


def test_a_useful_channel_comes_back_and_what_is_left_can_be_shrunk() -> None:
    model = make_model().float()
    masks = BipMasks(model, keep=0.5, gamma=5.0, rate=2.0)
    first, optimizer = masks.mask(), torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = [masks.lower_step(loss, optimizer) for _ in range(12) if masks.upper_step(loss) is not None]
    assert losses[-1] < losses[0] and not torch.equal(masks.mask(), first)
    assert masks.finish() == 6
    weights = Weights(CONFIG, model.state_dict(), None, "a test")
    shrunk = shrink_weights(weights).weights
    assert shrunk.model.feed_forward is not None and shrunk.model.feed_forward.hidden_size == 3
    assert logit_difference(weights, replace(shrunk, origin="b"), TOKENS) < 1e-5


def test_what_it_cannot_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves the router choosing"):
        BipMasks(make_model(), groups="experts", keep=0.5)
    with pytest.raises(ValueError, match=r"model\.pattern=-- has no heads"):
        BipMasks(make_model(), groups="heads", keep=0.5)
