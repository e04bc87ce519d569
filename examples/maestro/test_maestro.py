"""Maestro's prefixes are near the best maps of their rank, draws follow from the step alone, and empty tails can be cut."""

from __future__ import annotations

import pytest
import torch
from amfm_maestro.maestro import LeadingComponents, add_maestro, cut_ranks, low_rank_layers, tail_penalty, whole_first
from torch import nn
from torch.nn.utils import parametrize

from amfm.model.config.feed_forward import FeedForwardConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups
from amfm.model.scheduled import set_step

TOKENS, META = torch.arange(12)[None] % 16, PackMeta.one_document_a_row(1, 12)


def make_model(**feed_forward: object) -> HybridModel:
    section = FeedForwardConfig(**{"hidden_size": 16, "linear_kind": "lowrank", "linear_rank": 5, **feed_forward})
    config = ModelConfig(pattern="--", vocab_size=16, hidden_size=12, feed_forward=section)
    return HybridModel(config, single_rank_groups(), seed=3).double()


def test_every_prefix_of_a_linear_map_is_near_the_best_of_its_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q for _ in range(2))
    values = 0.7 ** torch.arange(8)
    target = left @ values.diag() @ right.T
    layer = nn.Module()
    layer.first = nn.Parameter(torch.randn(6, 8, generator=generator) * 0.3)
    layer.second = nn.Parameter(torch.randn(8, 6, generator=generator) * 0.3)
    parametrize.register_parametrization(layer, "first", LeadingComponents(6, 0, 1))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    for step in range(1500):
        layer.parametrizations["first"][0].set_step(step, 1500, 0)
        (layer.second @ layer.first - target).square().sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    first = layer.parametrizations["first"].original
    for rank in range(1, 7):
        error = float((layer.second[:, :rank] @ first[:rank] - target).square().sum())
        assert error <= 1.15 * float(values[rank:].square().sum()), rank


def test_a_draw_cuts_one_layer_and_follows_from_seed_and_step() -> None:
    model = make_model()
    assert add_maestro(model) == 4
    masks = [layer.parametrizations["first"][0] for layer in low_rank_layers(model)]
    drawn = []
    for step in range(40):
        set_step(model, step, 40)
        ranks = [mask.leading for mask in masks]
        assert sum(rank < 5 for rank in ranks) <= 1
        drawn.append(ranks)
    assert {min(ranks) for ranks in drawn} == {1, 2, 3, 4, 5} and len({tuple(ranks) for ranks in drawn}) > 8
    set_step(model, 7, 40)
    assert [mask.leading for mask in masks] == drawn[7]
    set_step(model, next(step for step, ranks in enumerate(drawn) if ranks[0] == 2), 40)
    layer = next(low_rank_layers(model.train()))
    whole = whole_first(layer)
    assert torch.equal(layer.first, torch.cat([whole[:2], torch.zeros_like(whole[2:])]))
    assert torch.equal(next(low_rank_layers(model.eval())).first, whole), "evaluation has all components"


def test_the_penalty_is_the_sum_over_tails_with_gradients() -> None:
    model = make_model()
    add_maestro(model)
    terms = []
    for layer in low_rank_layers(model):
        first, second = whole_first(layer), layer.second
        terms += [first[b:].norm() + second[:, b:].norm() for b in range(5)]
    expected, found = torch.stack(terms).sum(), tail_penalty(model)
    torch.testing.assert_close(found, expected)
    leaves = [weight for layer in low_rank_layers(model) for weight in (whole_first(layer), layer.second)]
    for actual, right in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(actual, right, rtol=1e-10, atol=1e-12)


def test_empty_tails_are_cut_and_the_logits_stay() -> None:
    model = make_model()
    add_maestro(model)
    with torch.no_grad():
        for layer, rank in zip(low_rank_layers(model), (3, 2, 1, 3)):
            layer.second[:, rank:] = 0
    assert torch.isfinite(torch.stack([p.grad.sum() for p in gradients_of(model)])).all()
    cut, ranks = cut_ranks(model.eval(), 0.01)
    assert ranks == [3, 2, 1, 3] and cut.config.feed_forward.linear_rank == 3
    torch.testing.assert_close(cut(TOKENS, META).logits_BTV, model(TOKENS, META).logits_BTV, rtol=1e-12, atol=1e-12)


def gradients_of(model: HybridModel) -> list[nn.Parameter]:
    tail_penalty(model).backward()
    return [parameter for parameter in model.parameters() if parameter.grad is not None]


def test_models_without_such_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"use model\.feed_forward\.linear_kind: lowrank"):
        add_maestro(make_model(linear_kind="dense", linear_rank=None))
