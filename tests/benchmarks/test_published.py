"""Published speeds vs. the plan's: sizes of the models, what a dispatcher sends, the fit, and the documented table."""

import json
from dataclasses import replace
from math import ceil, comb
from pathlib import Path

import pytest

from amfm.launch.plan.estimate import estimate
from amfm.launch.plan.exchange import BUCKET_ELEMENTS
from amfm.launch.plan.layout import held_by_stages
from amfm.model.config.low_precision import LowPrecisionConfig
from amfm.model.flops import count_parameters
from amfm.pretrain.checks.load import load_checked
from benchmarks.command import run
from benchmarks.published.__main__ import LARGE_ERROR, published
from benchmarks.published.planning import (
    THEIRS,
    anchor_as_dict,
    counted_off,
    fit_anchors,
    load_anchor,
    load_anchors,
    load_fp8_anchors,
    sent_rows,
)
from benchmarks.published.runs import PUBLISHED

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"


@pytest.fixture(scope="module")
def anchors():
    return load_anchors(CONFIGS)


@pytest.fixture(scope="module")
def rows(anchors):
    return [anchor_as_dict(anchor) for anchor in (*anchors, *load_fp8_anchors(CONFIGS))]


@pytest.mark.parametrize(
    ("preset", "total", "active"),
    # arXiv 2412.19437 section 4.2; the model cards of the others. Active counts of model cards leave the embedding out.
    [
        ("deepseek_v3", 671e9, 37e9),
        ("kimi_k2", 1.03e12, 32e9),
        ("qwen3_30b", 30.5e9, 3.3e9),
        ("moonlight_16b", 16e9, 3e9),
    ],
)
def test_a_model_has_the_published_size(preset, total, active):
    counts = count_parameters(load_checked(CONFIGS / "anchors" / f"{preset}.yaml").model)
    assert counts.total == pytest.approx(total, rel=1e-2)
    assert counts.active == pytest.approx(active, rel=5e-2)


def test_counted_flops_are_the_published_ones_where_the_whole_model_is_planned(anchors):
    for anchor in anchors:
        if not anchor.published.is_stand_in:
            published = anchor.published.flops_per_second / anchor.published.tokens_per_second
            assert anchor.flops_per_token == pytest.approx(published, rel=5e-2), anchor.published


def test_a_row_that_is_far_off_names_its_cause_and_no_other_does(rows):
    for row in rows:
        assert bool(row["cause"]) == (abs(row["error"]) > LARGE_ERROR), row


def test_a_dispatcher_sends_a_token_once_a_node(anchors):
    moe = next(anchor.config.model.moe for anchor in anchors if anchor.published.preset == "nemotron3_super_120b")
    nodes = 8 * (1 - comb(512 - 64, 22) / comb(512, 22))
    assert sent_rows(moe, 64, 8) == pytest.approx(nodes / (64 * (1 - comb(512 - 8, 22) / comb(512, 22))))
    # Inside one node once per rank, as amfm sends.
    assert sent_rows(moe, 8, 8) == 1.0


def test_tokens_that_are_counted_off_reach_the_places_of_neighboring_experts(anchors):
    models = {anchor.published.preset: anchor.config.model.moe for anchor in anchors}
    # 22 of 512: a token starts at an even number. Of 32 such in a node of 64 experts the last ten reach the next one.
    assert counted_off(models["nemotron3_super_120b"], 8) == 1 + 10 / 32
    # Of the 4 starts in a rank of 8, 0 and 2 reach the two ranks after it and 4 and 6 three.
    assert counted_off(models["nemotron3_super_120b"], 64) == 3.5
    assert counted_off(models["anchors/qwen3_30b"], 8) == 1  # 8 of a rank's 16
    assert counted_off(models["anchors/deepseek_v3"], 64) == 2  # 8, of ranks of 4
    assert counted_off(models["anchors/kimi_k2"], 32) == (1 + 2 + 1) / 3  # 8, of ranks of 12: from 0, 8 and 4
    assert sent_rows(models["anchors/qwen3_30b"], 8, 8, has_router=False) < 0.2


def test_a_padded_row_has_its_padding_and_no_luck_of_routing(anchors):
    padded = [anchor for anchor in anchors if anchor.published.padding > 1.0]
    assert {anchor.published.routing for anchor in padded} == {"forced", "natural"}
    assert {anchor.assumptions.imbalance for anchor in padded} == {1.1}
    assert len({anchor.plan(THEIRS).step.total() for anchor in padded}) == 1
    for anchor in anchors:
        if anchor not in padded:
            assert anchor.assumptions.imbalance == (1.2 if anchor.published.routing == "natural" else 1.0)


def test_memory_is_what_the_plan_finds_without_being_given_it():
    anchor = load_anchor(next(run for run in PUBLISHED if run.has_router and run.multiprocessors is None), CONFIGS)
    found = estimate(anchor.config, anchor.layout, THEIRS, anchor.assumptions)
    assert anchor.plan(THEIRS) == found


def test_rows_of_a_stand_in_for_routers_are_planned_without_their_products_and_losses(anchors):
    for anchor in anchors:
        with_router = replace(anchor, published=replace(anchor.published, has_router=True))
        faster, slower = (each.plan(THEIRS).tokens_per_second for each in (anchor, with_router))
        assert (faster == slower) == anchor.published.has_router and slower <= faster < 1.1 * slower
        assert anchor.published.has_router or not anchor.config.model.moe.sequence_loss_weight


def test_fsdp_sends_weights_and_gradients_more_often_than_zero_1(anchors):
    for anchor in anchors:
        once = replace(anchor, published=replace(anchor.published, gathers=1, reductions=1))
        assert once.sent_again(THEIRS) == 0 and (anchor.sent_again(THEIRS) > 0) == (anchor.published.gathers > 1)
    # Of Super all 64 ranks have other experts, so it gathers the rest 7 times more in bf16 and reduces it 3 times more in float32.
    anchor = next(each for each in anchors if each.published.preset == "nemotron3_super_120b")
    (held,) = held_by_stages(anchor.config.model, anchor.layout, anchor.config.train.sequence_length)
    moved = (7 * 2 + 3 * 4) * held.dense * 63 / 64
    hops = (7 + 3) * ceil(held.dense / BUCKET_ELEMENTS) * 63
    expected = 0.5 * (moved / THEIRS.ring_bytes_per_second(64, 1) + hops * THEIRS.hop_seconds)
    assert anchor.sent_again(THEIRS) == pytest.approx(expected, rel=1e-3)


def test_the_fit_finds_efficiencies_that_explain_the_speeds():
    runs = [load_anchor(run, CONFIGS) for run in PUBLISHED if run.preset.endswith("qwen3_30b")]
    slow = THEIRS.model_copy(update={"product_efficiency": 0.4, "memory_efficiency": 0.5})
    measured = [
        replace(
            anchor,
            published=replace(
                anchor.published, tokens_per_second=anchor.plan(slow).tokens_per_second / anchor.published.gpus
            ),
        )
        for anchor in runs
    ]
    assert any(abs(anchor.ratio(anchor.plan(THEIRS)) - 1) > 0.1 for anchor in measured)
    found = fit_anchors(measured)
    assert all(anchor.ratio(anchor.plan(found)) == pytest.approx(1, abs=0.02) for anchor in measured)


def test_a_run_in_fp8_is_planned_by_a_recipe():
    for anchor in load_fp8_anchors(CONFIGS):
        wide = anchor.config.model_copy(update={"low_precision": LowPrecisionConfig()})
        plain = estimate(wide, anchor.layout, THEIRS, anchor.assumptions)
        assert anchor.plan(THEIRS).tokens_per_second > 1.05 * plain.tokens_per_second
        assert anchor.plan(THEIRS).mfu_mixed is not None and plain.mfu_mixed is None


def test_the_documentation_holds_what_the_command_prints(rows):
    text = (ROOT / "docs" / "benchmarks" / "planning.md").read_text(encoding="utf-8")
    for row in rows:
        planned = f"{row['predicted_tokens_per_second_per_gpu']:,.0f} ({row['error']:+.0%})"
        assert f"{row['published_tokens_per_second_per_gpu']:,} | {planned}" in text, row


def test_the_table_of_anchors(capsys):
    assert run(published, [str(CONFIGS)]) == 0
    captured = capsys.readouterr()
    assert "16,789" in captured.out
    assert "forced routing: median error" in captured.err
    assert "planned with Nano's blocks" in captured.err
    assert run(published, [str(CONFIGS), "--json"]) == 0
    for row in json.loads(capsys.readouterr().out):
        if not row["is_stand_in"]:
            assert row["error"] == pytest.approx(
                row["predicted_tokens_per_second_per_gpu"] / row["published_tokens_per_second_per_gpu"] - 1
            )


def test_a_folder_without_presets_is_refused(capsys, tmp_path):
    assert run(published, [str(tmp_path)]) == 2
    assert "nemotron3_nano_30b.yaml" in capsys.readouterr().err
