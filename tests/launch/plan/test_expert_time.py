"""Exchanges of experts next to what their blocks compute: passes laid out by hand, and what halves cost and spare."""

from dataclasses import replace

import pytest

from amfm.launch.plan.activations import storage_of
from amfm.launch.plan.exchanges.stage import pass_exchanges
from amfm.launch.plan.expert_time import (
    Stop,
    computed_around,
    expert_exchange_seconds,
    seconds_of_two_batches,
    waiting_seconds,
)
from amfm.launch.plan.layout import Layout, held_by_stages
from amfm.launch.plan.time import block_seconds, estimate_step
from tests.launch.plan.presets import H100, preset


def test_a_pass_waits_for_what_has_not_arrived_when_it_is_needed():
    # Rows are there at 4, sums leave at 14 and are there at 18, when 15 seconds are computed and 3 were waited for.
    assert waiting_seconds(4.0, 4.0, 1.0, 10.0, 1.0, 1) == 3.0 + 3.0
    assert waiting_seconds(4.0, 4.0, 0.0, 10.0, 0.0, 1) == 8.0
    assert waiting_seconds(4.0, 4.0, 5.0, 10.0, 9.0, 1) == 0.0
    # The first half is there at 2; its sums are sent in parallel with the second half's experts, whose own leave at 12.
    assert waiting_seconds(4.0, 4.0, 1.0, 10.0, 1.0, 2) == 1.0 + 1.0
    # Experts are quick: the second half is there at 4, the first one's sums leave then, and all are home at 8.
    assert waiting_seconds(4.0, 4.0, 0.0, 1.0, 0.0, 2) == pytest.approx(8.0 - 1.0)


def exchanged(config, layout, **options):
    held = held_by_stages(config.model, layout, config.train.sequence_length)[0]
    given = {"imbalance": 1.0, "sent_rows": 1.0} | options
    return held, expert_exchange_seconds(config, layout, H100, storage_of(config), held, **given)


def test_no_more_is_hidden_than_is_computed_meanwhile_and_nothing_is_lost():
    config = preset("nemotron3_ultra_550b", ranks=1024)
    layout = replace(Layout.of(config, 1024), overlap_experts=False)
    held, (waited, hidden) = exchanged(config, layout)
    _, (whole, nothing) = exchanged(config, layout, meanwhile="nothing")
    assert nothing == 0.0 < hidden < whole
    assert waited + hidden == pytest.approx(whole)
    first, last, _ = computed_around(config, layout, H100, storage_of(config), 1.0)
    assert hidden <= held.letters.count("E") * 3 * (first + last) * (1 + 1e-9)
    assert exchanged(config, replace(layout, expert=1))[1] == (0.0, 0.0)


def test_what_recomputation_sends_again_is_counted_and_hides_like_a_first_pass():
    config = preset("nemotron3_ultra_550b", ranks=1024)
    layout = replace(Layout.of(config, 1024), overlap_experts=False)
    counts = exchanged(config, layout, meanwhile="nothing", sent_rows=0.0)[1][0]
    whole = [exchanged(config, layout, meanwhile="nothing", repeats=times)[1][0] for times in (0, 1, 2)]
    # Both ways again are half of a step's exchanges; the way out has weights of choices besides.
    assert whole[2] - whole[0] == pytest.approx((whole[0] - counts) / 2)
    assert whole[1] - whole[0] > whole[2] - whole[1] > 0.0
    meanwhile = [exchanged(config, layout, repeats=times)[1] for times in (0, 1, 2)]
    assert [sum(seconds) for seconds in meanwhile] == pytest.approx(whole)
    assert meanwhile[0][1] < meanwhile[1][1] < meanwhile[2][1]


def test_exchanges_next_to_another_micro_batch_wait_for_what_its_blocks_do_not_cover():
    config = preset("nemotron3_ultra_550b", ranks=1024)
    layout = replace(Layout.of(config, 1024), overlap_experts=False)
    counts = exchanged(config, layout, meanwhile="nothing", sent_rows=0.0)[1][0]
    held, (whole, _) = exchanged(config, layout, meanwhile="nothing")
    for covered, exposed in ((0.25, 0.75), (1.0, 0.0), (3.0, 0.0)):
        one = covered * (whole - counts) / len(held.letters)
        block = {(letter, False): one for letter in held.letters}
        _, (waited, hidden) = exchanged(config, layout, meanwhile="blocks", block=block)
        assert waited - counts == pytest.approx(exposed * (whole - counts), abs=1e-9)
        assert waited + hidden == pytest.approx(whole)


def test_halves_hide_more_and_cost_what_reads_the_weights_again():
    config = preset("nemotron3_ultra_550b", ranks=1024)
    layout = replace(Layout.of(config, 1024), overlap_experts=False)
    halves = replace(layout, overlap_experts=True)
    assert exchanged(config, halves)[1][0] < exchanged(config, layout)[1][0]
    storage = storage_of(config)
    seconds = [block_seconds(config, "E", place, H100, storage, 1.0) for place in (layout, halves)]
    held = held_by_stages(config.model, layout, config.train.sequence_length)[0]
    weights = 2 * held.routed / held.letters.count("E")
    # Read once more forward and backward, their gradients written twice and added.
    assert seconds[1] - seconds[0] > 3 * weights / H100.memory_bytes_per_second
    step = estimate_step(config, halves, H100, storage, overlap=0.5)
    assert dict(step.hidden_parts())["expert exchanges"] == step.hidden_experts > 0
    assert step.hidden_experts not in dict(step.parts()).values()


def test_halves_in_turns_wait_at_the_ends_of_a_piece_alone_where_they_compute_longer_than_rows_travel():
    one = Stop(before=1.0, first=0.0, experts=10.0, last=0.0, out=4.0, home=4.0)
    # Rows of the first half are there at 5 and of the second at 9; sums leave at 15 and 25, and are home at 19 and 29.
    assert seconds_of_two_batches([one], after=0.0) == 3.0 + 4.0
    # With 5 seconds before it nothing of the first half is waited for: the second computes them meanwhile.
    longer = one._replace(before=5.0)
    assert seconds_of_two_batches([longer], after=0.0) == 4.0
    assert seconds_of_two_batches([longer] * 3, after=0.0) == 4.0
    assert seconds_of_two_batches([longer] * 3, after=4.0) == 0.0
    # Where rows are sent longer than anything is computed, the link is never idle, and computing waits for it.
    slow = Stop(before=1.0, first=0.0, experts=1.0, last=0.0, out=4.0, home=4.0)
    assert seconds_of_two_batches([slow] * 3, after=0.0) == 1.0 + 3 * 16.0 - 3 * 4.0


def test_rows_in_turns_hand_in_what_two_micro_batches_of_half_of_them_do_and_wait_for_less():
    config = preset("qwen3_next_80b", ranks=128)
    single = replace(Layout.of(config, 128), micro_batch_size=1, overlap_experts=False)
    turns = replace(single, micro_batch_size=2, overlap_experts="two_batch")
    assert turns.one_sub_batch() == single
    for held in held_by_stages(config.model, single, config.train.sequence_length):
        once, both = ([each for each in pass_exchanges(config, layout, held)] for layout in (single, turns))
        pairs = [(one, two) for one, two in zip(once, both, strict=True) if one.axis != "pp"]
        assert all(two.calls == 2 * one.calls and two.stage_bytes == 2 * one.stage_bytes for one, two in pairs)
        assert {one.axis for one, _ in pairs} == {"ep"}
    storage = storage_of(config)
    steps = [estimate_step(config, layout, H100, storage, overlap=0.5, imbalance=1.2) for layout in (single, turns)]
    assert steps[1].compute == pytest.approx(steps[0].compute)
    assert steps[1].communication["expert"] < 0.3 * steps[0].communication["expert"]
    travelled = [step.communication["expert"] + step.hidden_experts for step in steps]
    assert travelled[1] == pytest.approx(travelled[0], rel=1e-3)
