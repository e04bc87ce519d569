"""Factored feed-forwards: each is its dense product, starts as a dense matrix does, and is counted and rejected rightly."""

from __future__ import annotations

import pytest
import torch

from amfm.model.config.checks import check_model
from amfm.model.config.core_options import FeedForwardConfig
from amfm.model.config.moe import MoeConfig
from amfm.model.config.schema import GuideConfig
from amfm.model.config.structure import Structure
from amfm.model.feed_forward import FeedForward
from amfm.model.flops import count_parameters, flops_per_token
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import single_rank_groups
from amfm.model.shapes import weight_shapes
from amfm.model.structured import dense_matrix, dense_singular_values
from amfm.pretrain.step import set_step
from tests.model.small_models import small_config

KINDS = {
    "lowrank": {"linear_kind": "lowrank", "linear_rank": 5},
    "blockshuffle": {"linear_kind": "blockshuffle", "linear_blocks": 2},
    "blockdense": {"linear_kind": "blockdense", "linear_rank": 6, "linear_blocks": 3},
}


def feed_forward_config(kind, activation="swiglu", inner=24):
    section = FeedForwardConfig(hidden_size=inner, activation=activation, **KINDS[kind])
    return small_config("-", feed_forward=section)


@pytest.mark.parametrize("activation", ["swiglu", "squared_relu"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_factored_layer_is_its_dense_product(kind, activation):
    config = feed_forward_config(kind, activation)
    mixer = HybridModel(config, single_rank_groups(), seed=2).double().blocks[0].mixer
    dense = FeedForward(12, 24, activation, single_rank_groups(), name="x", backend="torch").double()
    structure = config.feed_forward.structure()
    with torch.no_grad():
        for ours, layer in ((mixer.up_proj, dense.up_proj), (mixer.down_proj, dense.down_proj)):
            layer.weight.copy_(dense_matrix(structure, ours.first, ours.second))
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 7, 12, dtype=torch.float64)
    found, expected = FeedForward.forward(mixer, x), dense(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    factors = [mixer.up_proj.first, mixer.up_proj.second, mixer.down_proj.first, mixer.down_proj.second]
    given, *of_factors = torch.autograd.grad(found, [x, *factors], grad)
    wanted, up, down = torch.autograd.grad(expected, [x, dense.up_proj.weight, dense.down_proj.weight], grad)
    torch.testing.assert_close(given, wanted, rtol=1e-11, atol=1e-11)
    for layer, gradient, own in ((mixer.up_proj, up, of_factors[:2]), (mixer.down_proj, down, of_factors[2:])):
        leaves = [factor.detach().clone().requires_grad_() for factor in (layer.first, layer.second)]
        through = torch.autograd.grad(dense_matrix(structure, *leaves), leaves, gradient)
        for left, right in zip(own, through, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-11)


def test_block_shuffle_has_full_rank_where_low_rank_of_as_many_weights_has_not():
    config = small_config(
        "-",
        hidden_size=64,
        feed_forward=FeedForwardConfig(hidden_size=64, linear_kind="blockshuffle", linear_blocks=4),
    )
    mixer = HybridModel(config, single_rank_groups()).blocks[0].mixer
    assert torch.linalg.matrix_rank(dense_matrix(Structure("blockshuffle", None, 4), *mixer.up_proj.parameters())) == 64
    assert config.feed_forward.structure().weights(64, 64) == 64 * 64 // 2
    assert Structure("lowrank", 16).weights(64, 64) == 64 * 64 // 2


@pytest.mark.parametrize("kind", KINDS)
def test_first_values_are_those_of_a_dense_matrix_in_law_or_orthogonal_blocks(kind):
    structure = {"lowrank": Structure("lowrank", 96), "blockshuffle": Structure("blockshuffle", None, 4)}
    given = structure.get(kind, Structure("blockdense", 64, 4))
    section = FeedForwardConfig(
        hidden_size=384, linear_kind=given.kind, linear_rank=given.rank, linear_blocks=given.blocks
    )
    config = small_config("-", hidden_size=256, feed_forward=section)
    mixer = HybridModel(config, single_rank_groups(), seed=5).blocks[0].mixer
    again = HybridModel(config, single_rank_groups(), seed=5).blocks[0].mixer
    assert all(map(torch.equal, mixer.state_dict().values(), again.state_dict().values()))
    found = torch.linalg.svdvals(dense_matrix(given, *mixer.up_proj.parameters()).double())
    dense = torch.linalg.svdvals(
        0.3 * torch.randn(384, 256, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    )
    if kind == "lowrank":
        torch.testing.assert_close(found[:96], dense[:96], rtol=0.03, atol=0)
    else:
        number = 256 if kind == "blockshuffle" else 64
        # All of them 1, whatever the width.
        torch.testing.assert_close(found[:number], torch.ones_like(found[:number]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_guide_begins_as_the_product_and_fades_until_nothing_reads_it(kind):
    given = feed_forward_config(kind)
    plain = HybridModel(given, single_rank_groups(), seed=2).double()
    model = HybridModel(
        given.model_copy(update={"self_guided_training": GuideConfig()}), single_rank_groups(), seed=2
    ).double()
    mixer, x = model.blocks[0].mixer, torch.randn(2, 5, 12, dtype=torch.float64)
    expected = FeedForward.forward(plain.blocks[0].mixer, x)
    for step in range(5):
        set_step(model, step, 8)
        torch.testing.assert_close(FeedForward.forward(mixer, x), expected, rtol=1e-5, atol=1e-6)
    assert float(mixer.up_proj.alpha) == 0
    with torch.no_grad():
        mixer.up_proj.guide_weight.fill_(3.0)
    torch.testing.assert_close(FeedForward.forward(mixer, x), expected, rtol=1e-12, atol=1e-12)
    set_step(model, 2, 8)
    assert float(mixer.up_proj.alpha) == pytest.approx(0.5)
    halves = 0.5 * plain.blocks[0].mixer.up_proj.from_stream(x) + 0.5 * 3.0 * x.sum(-1, keepdim=True)
    torch.testing.assert_close(mixer.up_proj.from_stream(x), halves, rtol=1e-12, atol=1e-12)


def test_skipped_steps_leave_the_guide_out_with_a_zero_gradient_and_are_drawn_alike_for_all_layers():
    config = feed_forward_config("lowrank").model_copy(
        update={"self_guided_training": GuideConfig(skip=True), "pattern": "--"}
    )
    model = HybridModel(config, single_rank_groups(), seed=2)
    x, skipped = torch.randn(2, 5, 12), []
    for step in range(40):
        set_step(model, step, 80)
        layers = [layer for block in model.blocks for layer in (block.mixer.up_proj, block.mixer.down_proj)]
        assert len({layer.skips for layer in layers}) == 1
        skipped.append(layers[0].skips)
        if skipped[-1]:
            model.zero_grad()
            FeedForward.forward(model.blocks[0].mixer, x).sum().backward()
            assert not layers[0].guide_weight.grad.any() and layers[0].first.grad.any()
    # As likely as 1 - alpha: few at first, most at the end.
    assert sum(skipped[:10]) <= 3 and sum(skipped[-10:]) >= 7


def test_singular_values_are_those_of_normal_matrices():
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((300, 300), (120, 500)):
        drawn = torch.linalg.svdvals(torch.randn(rows, columns, generator=generator))
        expected = dense_singular_values(rows, columns, min(rows, columns))
        # The extreme ones of one draw scatter more.
        assert float((drawn - expected)[2:-2].abs().max()) < 0.06 * float(drawn[0])


@pytest.mark.parametrize("guide", [None, GuideConfig()])
@pytest.mark.parametrize("kind", KINDS)
def test_counts_and_shapes_are_those_of_the_built_model(kind, guide):
    shared = {f"shared_expert_{name}": value for name, value in KINDS[kind].items()}
    moe = MoeConfig(num_experts=3, top_k=1, expert_hidden_size=4, shared_expert_hidden_size=24, **shared)
    section = FeedForwardConfig(hidden_size=24, activation="swiglu", **KINDS[kind])
    config = small_config("-E", feed_forward=section, moe=moe, self_guided_training=guide)
    model = HybridModel(config, single_rank_groups())
    assert count_parameters(config).total == sum(parameter.numel() for parameter in model.parameters())
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == weight_shapes(config)
    factors = sum(p.numel() for name, p in model.blocks[0].mixer.named_parameters())
    assert flops_per_token(config, 8)["feed_forward"] == 6 * factors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"linear_kind": "lowrank"}, r"linear_rank=None is needed by lowrank; set it"),
        ({"linear_rank": 4}, r"linear_rank=4 is read only by lowrank and blockdense, not by dense; remove it"),
        ({"linear_kind": "lowrank", "linear_rank": 13}, r"linear_rank=13 must be at most 12, the smaller width"),
        (
            {"linear_kind": "lowrank", "linear_rank": 9},
            r"linear_rank=9 has as many weights as .* use at most 7, or dense",
        ),
        ({"linear_kind": "blockshuffle", "linear_blocks": 5}, r"linear_blocks=5 must divide model.hidden_size=12"),
        ({"linear_kind": "blockshuffle", "linear_blocks": 3}, r"linear_blocks=3 squared must divide 12, the smaller"),
        (
            {"linear_kind": "blockdense", "linear_rank": 5, "linear_blocks": 2},
            r"linear_blocks=2 must divide linear_rank=5",
        ),
        (
            {"linear_kind": "blockdense", "linear_rank": 12, "linear_blocks": 2},
            r"linear_rank=12 has as many weights as the dense matrix",
        ),
        (
            {"linear_kind": "blockshuffle", "linear_blocks": 2, "linear_rank": 3},
            r"linear_rank=3 is read only by .* not by blockshuffle",
        ),
    ],
)
def test_forms_that_cannot_be_are_refused(settings, message):
    config = small_config("-", feed_forward=FeedForwardConfig(hidden_size=24, **settings))
    with pytest.raises(ValueError, match=f"model.feed_forward.{message}"):
        check_model(config)


def test_a_guide_of_dense_matrices_is_refused():
    with pytest.raises(
        ValueError, match=r"model.self_guided_training has no effect: no block .* has factored matrices"
    ):
        check_model(small_config("-", self_guided_training=GuideConfig()))


def test_a_form_without_a_shared_expert_is_refused():
    moe = MoeConfig(num_experts=3, top_k=1, expert_hidden_size=4, shared_expert_linear_kind="lowrank")
    with pytest.raises(ValueError, match=r"no effect with model.moe.shared_expert_hidden_size=0"):
        check_model(small_config("E", moe=moe))
