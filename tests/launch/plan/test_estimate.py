"""The range of an MFU, and what a step loses to the host, to the slowest rank and to collectives."""

from dataclasses import replace

import pytest

from amfm.launch.plan.activations import Storage
from amfm.launch.plan.blocks.measured import block_bytes
from amfm.launch.plan.estimate import SPREAD, WORST_IMBALANCE, Assumptions, estimate, mfu_range
from amfm.launch.plan.hardware import ASSUMED
from amfm.launch.plan.layout import Layout, held_by_stages
from amfm.launch.plan.memory import cut_of
from amfm.launch.plan.plan import plan_as_dict
from amfm.launch.plan.time import host_seconds
from tests.launch.plan.presets import H100, plan_of, preset

SPREAD_EXPERTS = Layout(64, 1, 1, expert=8)


def nano():
    return preset("nemotron3_nano_30b")


def test_the_range_holds_what_is_expected_and_its_ends_say_what_they_assume():
    config, assumptions = nano(), Assumptions(imbalance=1.3)
    low, expected, high = mfu_range(config, SPREAD_EXPERTS, H100, assumptions)
    own = estimate(config, SPREAD_EXPERTS, H100, assumptions)
    assert (expected.mfu, expected.seconds) == (own.mfu, own.step.total())
    assert low.mfu < expected.mfu < high.mfu and low.seconds > expected.seconds > high.seconds
    for end, factor, imbalance in ((low, 1 / SPREAD, 1.3 * WORST_IMBALANCE), (expected, 1, 1.3), (high, SPREAD, 1)):
        products = f"GEMMs at {ASSUMED['product_efficiency'] * factor:.0%}"
        assert products in end.assumes and f"the most loaded rank at {imbalance:.2f}" in end.assumes


def test_the_json_has_the_range_and_what_each_end_assumes():
    found = plan_as_dict(plan_of("ladder_150m", ranks=8))
    ends = found["step"]["mfu_range"]
    assert list(ends) == ["low", "expected", "high"] and ends["expected"] == found["step"]["mfu"]
    assert ends["low"] < ends["expected"] < ends["high"]
    assert all("of the peak" in found["assumptions"][name] for name in ends)
    assert found["assumptions"]["imbalance"] == 1.2


def test_uneven_routing_slows_spread_experts_alone():
    config = nano()
    even, uneven = (estimate(config, SPREAD_EXPERTS, H100, Assumptions(imbalance=factor)) for factor in (1.0, 1.5))
    assert uneven.mfu < even.mfu
    assert uneven.step.compute["moe"] > even.step.compute["moe"]
    assert uneven.step.compute["mamba"] == even.step.compute["mamba"]
    assert uneven.memory.total() > even.memory.total()
    whole = [estimate(config, Layout(64, 1, 1), H100, Assumptions(imbalance=factor)) for factor in (1.0, 1.5)]
    assert whole[0].mfu == whole[1].mfu


def test_waiting_for_the_slowest_rank_grows_with_ranks():
    assert H100.slowest(1) == 0.0 < H100.slowest(8) < H100.slowest(4096)
    # Four standard deviations, of which 1 in 4,096 normal numbers is some.
    assert H100.slowest(4096) == pytest.approx(4.08 * ASSUMED["jitter"], rel=0.01)
    step = estimate(nano(), SPREAD_EXPERTS, H100, Assumptions()).step
    busy = sum(step.compute.values()) + sum(step.communication.values()) + step.bubble + step.reduction
    assert step.jitter == pytest.approx(H100.slowest(64) * busy)
    assert dict(step.parts())["waits for the slowest rank"] == step.jitter


def test_the_host_costs_launches_that_computing_does_not_hide_and_its_waits():
    config, storage = nano(), Storage(2, "triton")
    layout = replace(SPREAD_EXPERTS, recompute=frozenset("E"))
    (held,) = held_by_stages(config.model, layout, config.train.sequence_length)
    launches = waits = 0
    for letter in held.letters:
        cut = cut_of(config, layout, letter, 1.0)
        forward, backward = block_bytes(config.model, letter, storage, cut).launches
        launches += forward * (2 if letter == "E" else 1) + backward
        waits += 2 * (letter == "E")
    assert launches > 10 * len(held.letters) and waits > 0
    seconds = launches * H100.launch_seconds + waits * H100.wait_seconds
    assert host_seconds(config, layout, H100, storage, held, 0.0) == pytest.approx(seconds)
    hidden = host_seconds(config, layout, H100, storage, held, compute=1e3)
    assert hidden == pytest.approx(waits * H100.wait_seconds)
    assert (
        host_seconds(config, layout, H100, Storage(2, "torch"), held, 0.0) > seconds
    )  # operations of PyTorch are smaller
