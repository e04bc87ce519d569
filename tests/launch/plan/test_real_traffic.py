"""The bytes that ranks hand to collectives are those of the formulas, on every axis."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from amfm_simulate.step_traffic import STATUS_NUMBERS, step_exchanges

from amfm.launch.plan.blocks.expert_traffic import expert_traffic
from amfm.launch.plan.exchanges.stage import pass_exchanges
from amfm.launch.plan.layout import Layout, held_by_stages
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.step_sums import empty_sums
from benchmarks.small_steps import load_small
from tests.helpers.spawn import run_ranks
from tests.launch.plan.count_step import compare_bytes, load_layout

FACTORED = (
    "model.feed_forward.linear_kind=lowrank model.feed_forward.linear_rank=16 "
    "model.moe.shared_expert_linear_kind=blockshuffle model.moe.shared_expert_linear_blocks=4"
)
# Where a token has a choice on each rank, or one choice in all, no router changes how many rows are sent.
ONE_EACH = "model.moe.num_experts=4"
# Rows go out as codes; emulated, as no one here multiplies these.
NARROW = "low_precision.recipe=fp8_block low_precision.emulate=true low_precision.dispatch=fp8"
ONE_CHOICE = "model.moe.top_k=1 model.moe.normalize_probabilities=false"
MOM = "model.mixers={gated_deltanet: {num_heads: 4, head_dim: 8}, mom: {num_memories: 4}}"
LIGHTNING = "model.mixers.lightning.num_heads=8 model.mixers.lightning.head_dim=8"
INDEXER = "model.attention.indexer.top_k=50 model.attention.indexer.head_dim=8"
WARM_UP = f"{INDEXER} model.attention.indexer.stage=warm_up"
NGRAMS = "model.pattern=M{ngram_memory}E model.mixers.ngram_memory.head_dim=4 model.mixers.ngram_memory.table_size=50"
FEWER_ROWS = "train.global_batch_size=4 model.pattern=M*-E"  # and each kind of block once
TWO_RANKS = [
    f"expert=2 model.moe.capacity_factor=1.5 {FEWER_ROWS}",
    f"tensor=2 sequence_parallel=true zero_stage=2 model.attention.qk_norm=true {FEWER_ROWS}",
    f"context=2 model.moe.auxiliary_loss_weight=0.1 model.moe.sequence_loss_weight=0.1 {FEWER_ROWS}",
    "pipeline=2 model.tie_embeddings=true train.global_batch_size=8 model.pattern=ME*-",
]
TWO_RANKS_MORE = [
    "expert=2 model.moe.num_experts=2",
    f"expert=2 model.moe.capacity_factor=1.5 {NARROW}",
    f"expert=2 overlap_experts=true {ONE_CHOICE}",
    "expert=2 overlap_experts=true expert_buffer_factor=2",
    f"expert=2 overlap_experts=two_batch train.micro_batch_size=2 {ONE_CHOICE}",
    "expert=2 overlap_experts=true model.moe.capacity_factor=1.5",
    f"tensor=2 sequence_parallel=true {FACTORED} model.self_guided_training.share=0.5",
    "tensor=2 model.pattern=M/*E model.moe.bias=true",
    f"tensor=2 sequence_parallel=true model.moe.bias=true {INDEXER}",
    f"tensor=2 {WARM_UP}",
    "pipeline=2 schedule=interleaved virtual_stages=2 model.attention_residuals.blocks_per_source=2",
    "pipeline=2 schedule=interleaved virtual_stages=2 model.hyper_connections.streams=3",
    f"tensor=2 sequence_parallel=true {NGRAMS}",
    f"tensor=2 {NGRAMS}",
    f"context=2 {INDEXER}",
    f"context=2 model.pattern=ML*-E {LIGHTNING}",
    f"context=2 {WARM_UP}",
]
FOUR_RANKS = [
    f"expert=4 zero_stage=2 model.moe.latent_size=24 {ONE_EACH}",
    f"expert=2 expert_tensor=2 {ONE_CHOICE}",
    "expert=2 expert_tensor=2 overlap_experts=true model.moe.num_experts=2",
    "tensor=2 zero_stage=0",
    f"tensor=2 {FACTORED}",
    f"tensor=2 expert=4 model.moe.latent_size=24 {ONE_EACH}",
    f"tensor=2 sequence_parallel=true expert=4 {ONE_EACH}",
    f"tensor=2 sequence_parallel=true expert=2 expert_tensor=2 {ONE_CHOICE}",
    "tensor=4 model.mamba.num_groups=2 model.attention.num_kv_heads=2",
    "context=2 tensor=2 sequence_parallel=true",
    f"context=2 expert=4 {ONE_EACH}",
    "pipeline=2 tensor=2 sequence_parallel=true model.tie_embeddings=true",
    f"pipeline=2 expert=2 schedule=interleaved virtual_stages=2 {ONE_CHOICE}",
    "pipeline=2 context=2",
    "pipeline=2 tensor=2 sequence_parallel=true model.pattern=ME*-/*E/*E model.mtp.shared=true",
    f"expert=2 train.precision=bf16 {ONE_CHOICE}",
    f"expert=2 train.precision=bf16 {NARROW} {ONE_CHOICE}",
    f"expert=2 expert_tensor=2 {NARROW} {ONE_CHOICE}",
    "tensor=2 train.precision=bf16",
]


def overrides(layout: str) -> list[str]:
    return [
        word if word.startswith(("model", "train", "low_precision")) else f"parallel.{word}" for word in layout.split()
    ]


def count_all(layouts: list[str], num_ranks: int) -> list[dict[str, Any]]:
    return [compare_bytes(load_layout(overrides(layout), num_ranks)) for layout in layouts]


def assert_equal(results: list[dict[str, Any]], layouts: list[str]) -> None:
    for layout, result in zip(layouts, results, strict=True):
        differing = [row for row in result["rows"] if row["handed_bytes"] != row["formula_bytes"]]
        assert result["equal"] and not differing, (layout, differing)
        assert sum(row["handed_bytes"] for row in result["rows"]) > 5e5
        assert_calls_equal(result, layout)


def assert_calls_equal(result: dict[str, Any], layout: str) -> None:
    """What the plan's latencies count: calls in the passes, without all-reduces, which gradients have too."""
    config = load_layout(overrides(layout), result["ranks"])
    place = Layout.of(config, result["ranks"])
    planned: Counter[tuple[str, str, str]] = Counter()
    for held in held_by_stages(config.model, place, config.train.sequence_length):
        for found in pass_exchanges(config, place, held):
            calls = found.calls * place.stage_ranks * place.micro_batches(config)
            planned[found.axis, found.collective, found.dtype] += calls
    counted = {(row["axis"], row["collective"], row["dtype"]): row["calls"] for row in result["rows"]}
    differing = {key: (calls, counted.get(key)) for key, calls in planned.items() if calls != counted.get(key)}
    assert not {key: pair for key, pair in differing.items() if key[1] != "all_reduce"}, (layout, differing)


def test_counted_bytes_are_those_of_the_formulas_on_each_axis() -> None:
    assert_equal(run_ranks(count_all, TWO_RANKS, 2, num_ranks=2)[0], TWO_RANKS)


@pytest.mark.slow
def test_counted_bytes_are_those_of_the_formulas_where_axes_compose() -> None:
    assert_equal(run_ranks(count_all, FOUR_RANKS, 4, num_ranks=4)[0], FOUR_RANKS)


@pytest.mark.slow
def test_counted_bytes_are_those_of_the_formulas_with_other_blocks_on_an_axis() -> None:
    assert_equal(run_ranks(count_all, TWO_RANKS_MORE, 2, num_ranks=2)[0], TWO_RANKS_MORE)


def test_tokens_travel_to_experts_at_the_latent_width() -> None:
    def sent(*overrides: str) -> int:
        config = load_small(["parallel.expert=2", "train.precision=bf16", *overrides], 2)
        (held,) = held_by_stages(config.model, Layout.of(config, 2), config.train.sequence_length)
        traffic = expert_traffic(config, Layout.of(config, 2), held.letters.count("E"))
        assert traffic is not None and traffic.details is not None
        # With each row go the weights and ids of two choices in float32, out and in backward home.
        assert traffic.details.stage_bytes / traffic.rows.stage_bytes == 2 * 2 * 2 * 4 / (4 * width(config) * 2)
        return int(traffic.rows.stage_bytes)

    def width(config: RunConfig) -> int:
        assert config.model.moe is not None
        return config.model.moe.latent_size or config.model.hidden_size

    plain, latent = sent(), sent("model.moe.latent_size=24")
    # Two sequences of 128 tokens, 2 blocks, there and back, forward and backward, of all ranks; a rank has 4 of 8 experts, so that
    # neither of two choices falls on it with probability 4 / 8 * 3 / 7.
    assert plain == int(2 * 2 * 128 * 2 * (1 - 4 / 8 * 3 / 7) * 2 * 4 * 64 * 2)
    assert latent * 64 == pytest.approx(plain * 24, abs=64)


@pytest.mark.slow
def test_rows_travel_to_experts_with_weights_and_ids_of_their_choices() -> None:
    (result,) = run_ranks(count_all, ["expert=2 model.moe.num_experts=2"], 2, num_ranks=2)[0]
    (rows,) = [row for row in result["rows"] if row["axis"] == "ep" and row["dtype"] == "float32"]
    # Two choices per token, each on its own rank: rows four times, and twice the weights and ids of both choices.
    assert rows["handed_bytes"] == rows["formula_bytes"] == 16 * 128 * 2 * 2 * (4 * 64 + 2 * 2 * 2) * 4
    assert 0 < rows["sent_bytes"] < rows["handed_bytes"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["model.moe.auxiliary_loss_weight=0.1"],
        ["model.pattern=M{mom}*E/*E", MOM],
        ["model.pattern=M*-", "model.lora_mixer={rank: 2, num_experts: 4}"],
    ],
)
def test_a_steps_sums_are_those_that_it_reduces_whichever_block_has_a_router(arguments: list[str]) -> None:
    config = load_small(arguments, 2)
    sums = empty_sums(config.model, torch.device("cpu"))
    numbers = 2 + len(sums.auxiliary) + len(sums.mtp_nll) + sum(map(len, sums.expert_counts.values())) + STATUS_NUMBERS
    assert sums.auxiliary
    (found,) = [each for each in step_exchanges(config, Layout.of(config, 2)) if each.dtype == "float64"]
    assert found.stage_bytes == 2 * 8 * numbers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["parallel.zero_stage=3"], "parallel.zero_stage=3 has no formula"),
        (
            ["parallel.tensor=2", "parallel.zero_stage=0", "train.precision=bf16"],
            "parallel.zero_stage=0 in bf16 has no formula",
        ),
        (
            ["parallel.tensor=2", "train.recompute=full"],
            "train.recompute=full has no formula",
        ),
        (
            ["parallel.expert=2", "parallel.context=2", "model.moe.capacity_factor=1.5"],
            "model.moe.capacity_factor=1.5 has no formula with parallel.expert=2",
        ),
        (
            ["parallel.expert=2"],
            "model.moe.top_k=2 of 8 experts has no formula with parallel.expert=2",
        ),
        (["parallel.expert=3"], "parallel.expert=3: must divide model.moe.num_experts=8"),
    ],
)
def test_what_has_no_formula_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_layout(arguments, 2)
