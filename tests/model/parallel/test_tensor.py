"""Every block kind and the whole model cut over tensor ranks, tokens too: the losses and gradients of one rank in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from amfm.model.config.core_options import AttentionConfig, FeedForwardConfig, Mamba2Config
from amfm.model.config.moe import MoeConfig
from amfm.model.config.schema import GuideConfig, ModelConfig, MultipliersConfig
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import ProcessGroupCollection, single_rank_groups
from amfm.model.parallel.shards import parameter_shards
from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.engine.gradients import find_partial_gradients, sum_partial_gradients
from amfm.pretrain.parallel import initialize_parallel
from amfm.pretrain.step import set_step
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.shards import join_parts
from tests.helpers.spawn import run_ranks
from tests.model.small_models import loss_of, packed_batch, small_config

MOE = MoeConfig(
    num_experts=5,
    top_k=2,
    expert_hidden_size=8,
    shared_expert_hidden_size=10,
    shared_expert_gate=True,
    activation="swiglu",
    latent_size=6,
    auxiliary_loss_weight=0.1,
    sequence_loss_weight=0.1,
    z_loss_weight=0.1,
)
CONFIGS = {
    "whole": small_config(
        "ME*-M",
        moe=MOE,
        mamba=Mamba2Config(num_heads=6, head_dim=4, state_size=5, num_groups=2, chunk_size=8),
        logits_z_loss_weight=0.05,
    ),
    "tied": small_config(
        "*E",
        tie_embeddings=True,
        moe=MOE.model_copy(update={"latent_size": None, "activation": "gelu"}),
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, gate="head"),
        multipliers=MultipliersConfig(embedding=3.0, residual=0.22, logits=0.3),
    ),
    # One key-value head and one group of B and C, which both ranks hold; a norm group spans the ranks.
    "copies": small_config(
        "M*",
        mamba=Mamba2Config(num_heads=4, head_dim=3, state_size=5, num_groups=1, chunk_size=8),
        attention=AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=6, qk_norm=True, gate="element"),
    ),
    # LayerNorms after blocks, norms over all heads, whose mean spans the ranks, with key heads that both hold; biases of all but the output.
    "wide norms": small_config(
        "*-W",
        norm="layernorm",
        norm_placement="after",
        feed_forward=FeedForwardConfig(hidden_size=14, activation="gelu_tanh", bias=True),
        attention=AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=6, qk_norm="wide", bias="qkv"),
        mixers={
            "window": {
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 6,
                "window": 5,
                "qk_norm": "wide",
                "bias": "qkv",
            }
        },
    ),
    "low rank": small_config(
        "-E",
        self_guided_training=GuideConfig(),
        feed_forward=FeedForwardConfig(hidden_size=16, activation="swiglu", linear_kind="lowrank", linear_rank=4),
        moe=MOE.model_copy(
            update={
                "shared_expert_hidden_size": 12,
                "shared_expert_linear_kind": "blockdense",
                "shared_expert_linear_rank": 6,
                "shared_expert_linear_blocks": 2,
            }
        ),
    ),
    "block shuffle": small_config(
        "-",
        feed_forward=FeedForwardConfig(
            hidden_size=16, activation="swiglu", linear_kind="blockshuffle", linear_blocks=2
        ),
    ),
}
CASES = [(name, sequence_parallel) for name in CONFIGS for sequence_parallel in (False, True)]


@dataclass(frozen=True)
class Computed:
    """The training loss, logits, each token's loss; weights and gradients joined over ranks, by name.

    `unsummed`: the gradients that would be if the sum of this one over ranks were left out.
    """

    loss: Tensor
    logits_BTV: Tensor
    token_nll_R: Tensor
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    unsummed: dict[str, Tensor]


def compute(config: ModelConfig, groups: ProcessGroupCollection) -> Computed:
    model = HybridModel(config, groups, seed=3).double()
    set_step(model, 1, 4)
    tokens_BT, labels_BT, ids_BT = packed_batch(((7, 1, 13, 3), (24,)))
    meta = PackMeta.from_document_ids(ids_BT)
    output = model(tokens_BT, meta, labels_BT)
    loss = loss_of(output)
    loss.backward()
    with torch.no_grad():
        logits_BTV = model(tokens_BT, meta).logits_BTV
    partials = find_partial_gradients(model, groups)
    shards = {name: shard for name, _, shard in parameter_shards(model)}
    unsummed = {partial.name: partial.parameter.grad.clone() for partial in partials}
    sum_partial_gradients(partials, groups)
    return Computed(
        loss.detach(),
        logits_BTV,
        output.loss.token_nll_R,
        {name: join_parts(weight.detach(), shard, groups) for name, weight, shard in parameter_shards(model)},
        {name: join_parts(weight.grad, shard, groups) for name, weight, shard in parameter_shards(model)},
        {name: join_parts(part, shards[name], groups, alike=False) for name, part in unsummed.items()},
    )


def tensor_groups(sequence_parallel: bool) -> ProcessGroupCollection:
    section = ParallelConfig(tensor=2, sequence_parallel=sequence_parallel)
    return initialize_parallel(section, timeout_seconds=PATIENCE_SECONDS, num_threads=1).groups


def compute_all() -> list[Computed]:
    return [compute(CONFIGS[name], tensor_groups(sequence_parallel)) for name, sequence_parallel in CASES]


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[tuple[str, bool], Computed]]:
    return [dict(zip(CASES, results)) for results in run_ranks(compute_all, num_ranks=2)]


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Computed]:
    return {name: compute(config, single_rank_groups()) for name, config in CONFIGS.items()}


def assert_close(actual: Tensor, expected: Tensor, name: str) -> None:
    # float64: only the order of sums differs.
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_tensor_ranks_compute_what_one_does(case, two_ranks, one_rank):
    expected = one_rank[case[0]]
    for rank in two_ranks:
        actual = rank[case]
        for name, weight in expected.weights.items():
            assert torch.equal(actual.weights[name], weight), name
        torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(actual.logits_BTV, expected.logits_BTV, rtol=1e-9, atol=1e-10)
        # Each token's loss is reported in float32.
        torch.testing.assert_close(actual.token_nll_R, expected.token_nll_R, rtol=1e-5, atol=1e-6)
        assert actual.gradients.keys() == expected.gradients.keys()
        for name, gradient in expected.gradients.items():
            assert_close(actual.gradients[name], gradient, name)


FOUR_BLOCKS = {
    "blockshuffle": {"linear_kind": "blockshuffle", "linear_blocks": 4},
    "blockdense": {"linear_kind": "blockdense", "linear_rank": 8, "linear_blocks": 4},
    "lowrank": {"linear_kind": "lowrank", "linear_rank": 5},
}
FACTORED = {
    kind: small_config(
        "-",
        hidden_size=16,
        self_guided_training=GuideConfig(),
        feed_forward=FeedForwardConfig(hidden_size=32, activation="swiglu", **settings),
    )
    for kind, settings in FOUR_BLOCKS.items()
}


def compute_factored() -> list[Computed]:
    groups = initialize_parallel(ParallelConfig(tensor=4), timeout_seconds=PATIENCE_SECONDS, num_threads=1).groups
    return [compute(config, groups) for config in FACTORED.values()]


@pytest.mark.slow  # two ranks do it quickly, in the cases above
def test_four_tensor_ranks_compute_factored_layers_as_one_does():
    for results in run_ranks(compute_factored, num_ranks=4):
        for (kind, config), actual in zip(FACTORED.items(), results, strict=True):
            expected = compute(config, single_rank_groups())
            torch.testing.assert_close(actual.logits_BTV, expected.logits_BTV, rtol=1e-9, atol=1e-10)
            for name, gradient in expected.gradients.items():
                assert_close(actual.gradients[name], gradient, f"{kind}: {name}")


HEADS = {"blocks.2.mixer.q_norm.weight", "blocks.2.mixer.k_norm.weight"}
STREAM = {f"blocks.{index}.norm.weight" for index in range(5)} | {"final_norm.weight", "blocks.1.mixer.router.weight"}
COPIES = {"blocks.0.mixer.in_proj.weight", "blocks.0.mixer.conv.weight", "blocks.0.mixer.conv.bias"}
COPIES |= {f"blocks.1.mixer.{name}" for name in ("k_proj.weight", "v_proj.weight", "q_norm.weight", "k_norm.weight")}
SUMMED = {
    ("whole", False): HEADS,
    ("whole", True): HEADS
    | STREAM
    | {f"blocks.1.mixer.{name}.weight" for name in ("latent_down", "latent_up", "shared_gate")},
    ("copies", False): COPIES,
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_leaving_out_any_one_sum_of_gradients_is_noticed(case, two_ranks, one_rank):
    expected = one_rank[case[0]].gradients
    for rank in two_ranks:
        unsummed = rank[case].unsummed
        assert unsummed.keys() == SUMMED.get(case, unsummed.keys())
        for name, gradient in unsummed.items():
            with pytest.raises(AssertionError):
                assert_close(gradient, expected[name], name)


def keep_shares() -> list[bool]:
    """For each kind of block: whether backward keeps the residual stream of all tokens [B, T, D]."""
    groups = tensor_groups(sequence_parallel=True)
    _, _, ids_BT = packed_batch(((7, 1, 13, 3), (24,)))
    kept: list[bool] = []
    mamba = Mamba2Config(num_heads=6, head_dim=5, state_size=5, num_groups=2, chunk_size=8)
    for block in HybridModel(small_config("M*-", mamba=mamba), groups).blocks:
        shapes: list[tuple[int, ...]] = []

        def note(tensor: Tensor, shapes: list[tuple[int, ...]] = shapes) -> Tensor:
            shapes.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            y_BTD = block.mixer(torch.randn(2, 12, 12, requires_grad=True), PackMeta.from_document_ids(ids_BT)).y_BTD
        assert y_BTD.shape == (2, 12, 12) and (2, 12, 12) in shapes
        kept.append(any(shape in ((2, 24, 12), (24, 2, 12), (48, 12)) for shape in shapes))
    return kept


def test_backward_keeps_a_ranks_share_of_the_stream():
    assert run_ranks(keep_shares, num_ranks=2) == [[False, False, False]] * 2
