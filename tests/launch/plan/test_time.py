"""Seconds of a step: arithmetic at its peak bounds them, overlap hides what it can."""

import pytest

from amfm.kernels.linear_cross_entropy.op import cross_entropy_flops
from amfm.launch.plan.activations import storage_of
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.roofline import Roofline, head_seconds
from amfm.launch.plan.time import estimate_step, left_after_pieces
from amfm.model.flops import count_parameters, flops_per_token
from amfm.pretrain.recompute import recomputed_letters
from tests.launch.plan.presets import H100, PRESETS, headers, preset


def test_recomputed_blocks_pass_forward_twice():
    plain, again = preset("ladder_1b_a300m"), preset("ladder_1b_a300m", "train.recompute=full")
    before, after = (
        estimate_step(
            config, Layout(8, 2, 1, recompute=recomputed_letters(config)), H100, storage_of(config), overlap=1.0
        ).compute
        for config in (plain, again)
    )
    assert after.pop("head") == before.pop("head")
    for kind, seconds in before.items():
        # A forward pass is a third of three, or less in attention and scans, whose backward pass is slower.
        assert 1 + 1 / 4 <= after[kind] / seconds <= 1 + 1 / 3 + 1e-9


def test_a_step_is_never_faster_than_its_arithmetic_at_peak():
    for name in PRESETS:
        config = preset(name, f"model.pattern={preset(name).model.pattern.replace('|', '')}")  # one stage
        hardware = headers(name)[0].hardware
        step = estimate_step(config, Layout(1, 1, 1), hardware, storage_of(config), overlap=1.0)
        train = config.train
        flops = sum(flops_per_token(config.model, train.sequence_length).values())
        tokens = train.global_batch_size * train.sequence_length
        assert step.total() > flops * tokens / hardware.peak_flops(train.precision)
        assert step.reduction == step.exposed_gathers == 0.0


def test_sums_in_products_take_the_bandwidth_of_products_and_no_pass_of_their_own():
    config = preset("ladder_8b_a1b", "parallel.zero_stage=1")
    behind = preset("ladder_8b_a1b", "parallel.zero_stage=1", "train.gradient_sums=hook")
    layout = Layout(64, 1, 1)
    inside, apart = (
        estimate_step(each, layout, H100, storage_of(each), overlap=0.0, stage=0) for each in (config, behind)
    )
    # A bf16 gradient read, a float32 sum read and written, per pass and parameter; the head's is scaled on its way and stays.
    model, parameters = config.model, count_parameters(config.model).total
    head = model.vocab_size * model.hidden_size
    moved = layout.micro_batches(config) * 10 * (parameters - head)
    saved = moved / (H100.memory_bytes_per_second * H100.memory_efficiency)
    assert apart.optimizer - inside.optimizer == pytest.approx(saved, rel=1e-3)
    # Products that a GPU's memory bounds read and write the sums.
    assert sum(inside.compute.values()) >= sum(apart.compute.values())
    assert inside.total() < apart.total()
    whole = (estimate_step(each, Layout(64, 3, 1), H100, storage_of(each), overlap=0.0) for each in (config, behind))
    assert len({step.total() for step in whole}) == 1, "ZeRO 3 has no sums to add to"


def test_a_reduction_hides_behind_a_backward_pass_and_zero_2_reduces_in_each():
    config = preset("ladder_8b_a1b")
    plain, bucketed, each = (
        estimate_step(config, Layout(64, stage, 1), H100, storage_of(config), overlap=0.0) for stage in (0, 1, 2)
    )
    assert plain.hidden == 0.0 < bucketed.hidden
    # No more bytes than an all-reduce with the gathers that follow, and part of them next to compute.
    assert bucketed.reduction < 0.75 * plain.reduction
    one_pass = sum(bucketed.compute.values()) / Layout(64, 1, 1).micro_batches(config)
    assert bucketed.hidden <= one_pass * (1 + 1e-9)
    assert each.hidden > bucketed.hidden and each.total() > bucketed.total()


def test_a_pipeline_that_drains_more_often_idles_as_much_more():
    config = preset("ladder_8b_a1b")
    once, often = (
        estimate_step(config, Layout(64, 1, 1, pipeline=4), H100, storage_of(config), overlap=0.5, drains=drains)
        for drains in (1, 3)
    )
    assert often.bubble == pytest.approx(3 * once.bubble) and once.bubble > 0
    assert often.total() > once.total()


@pytest.mark.parametrize("seconds", [0.5, 3.0, 9.0, 40.0])
@pytest.mark.parametrize(("pieces", "stages"), [(1, 4), (2, 3), (4, 8)])
def test_what_is_left_of_a_reduction_is_that_of_a_link_that_serves_piece_after_piece(seconds, pieces, stages):
    schedule = "interleaved" if pieces > 1 else "1f1b"
    layout = Layout(64, 1, 1, pipeline=stages, schedule=schedule, virtual_stages=pieces)
    one_pass, free, now = 2.0, 0.0, 0.0
    for _ in range(pieces):
        # All micro-batches of the last round go through the piece; during the last one its buckets become complete.
        last_pass_begins = now + (stages - 1) * one_pass / pieces
        free = max(free, last_pass_begins) + seconds / pieces
        now += stages * one_pass / pieces
    assert left_after_pieces(seconds, layout, 16, one_pass) == pytest.approx(max(0.0, free - now))


def test_overlap_hides_gathers_but_no_more_than_there_is_compute():
    config = preset("ladder_8b_a1b")
    steps = [
        estimate_step(config, Layout(64, 3, 1), H100, storage_of(config), overlap=part) for part in (0.0, 0.5, 1.0)
    ]
    assert steps[0].exposed_gathers > steps[1].exposed_gathers > steps[2].exposed_gathers >= 0
    hidden = steps[0].exposed_gathers - steps[2].exposed_gathers
    assert hidden <= sum(steps[2].compute.values()) * (1 + 1e-9)


def test_a_routers_logits_are_products_of_bfloat16_of_which_backward_has_four():
    rows, inputs, outputs = 8192, 8192, 4096  # so large that arithmetic binds
    line, wide = Roofline(H100, "bf16", 2), Roofline(H100, "float32", 4)
    line.logits(rows, inputs, outputs)
    wide.logits(rows, inputs, outputs)
    flops = 2 * rows * inputs * outputs
    assert line.seconds == pytest.approx(5 * flops / (989e12 * 0.70))
    assert wide.seconds == pytest.approx(3 * flops / (67e12 * 0.70))


@pytest.mark.parametrize(("tensor", "logit_bytes"), [(1, 10), (8, 2)])
def test_the_head_makes_logits_twice_only_where_tensor_ranks_share_it(tensor, logit_bytes):
    config = preset("turbos_560b", "train.gradient_sums=hook")
    layout = Layout(8, 1, 1, tensor=tensor)
    tokens, hidden, vocab = layout.tokens(config), config.model.hidden_size, config.model.vocab_size // tensor
    bandwidth = H100.memory_bytes_per_second * H100.memory_efficiency
    arithmetic = cross_entropy_flops(tokens, vocab, hidden, recompute=tensor > 1) / (989e12 * 0.70)
    moved = logit_bytes * tokens * vocab + 18 * tokens * hidden
    slices = -(-tokens // max(256, min(4096, 2**28 // vocab // 128 * 128)))
    moved += (slices - 1) * 10 * vocab * hidden  # gradients of the weight of all slices but the first are added
    assert head_seconds(config, layout, H100, storage_of(config)) == pytest.approx(arithmetic + moved / bandwidth)
