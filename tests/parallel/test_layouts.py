"""Every layout trains as one rank: losses, norms, routing and every gathered weight over two or three steps in float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from amfm.pretrain.monitor.metrics import flatten_numbers
from tests.helpers.spawn import run_ranks
from tests.parallel.layouts import LAYOUTS, LEARNING_RATE, Layout, Outcome, one_rank, outcome_of, run_all
from tests.pretrain.tiny_run import tiny_data

# float32 sums in another order; AdamW divides by the root of the second moment, which keeps relative errors as they are.
TOLERANCE = 1e-5
# Sums of squares in float32; of updates, which AdamW makes of small gradients and their roots.
NORM_TOLERANCE, STEP_NORM_TOLERANCE = 2e-5, 1e-4
# Newton-Schulz makes the smallest singular values, and the rounding in them, a few hundred times larger.
MUON_TOLERANCE = 1e-3


def assert_same_training(actual: Outcome, expected: Outcome, step_tolerance: float = TOLERANCE) -> None:
    assert actual.losses == pytest.approx(expected.losses, rel=TOLERANCE)
    assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=TOLERANCE)
    for own, other in zip(actual.auxiliary, expected.auxiliary, strict=True):
        # The z-loss of the logits is reported as a difference of float32 sums around 6.
        assert own["logits_z"] == pytest.approx(other["logits_z"], abs=6 * 2**-22)
        assert own == pytest.approx(other | {"logits_z": own["logits_z"]}, rel=TOLERANCE)
    for ahead, other_ahead in zip(actual.mtp_losses, expected.mtp_losses, strict=True):
        assert ahead == pytest.approx(other_ahead, rel=TOLERANCE)
    assert actual.expert_counts == expected.expert_counts
    assert actual.weights.keys() == expected.weights.keys()
    assert_same_inspection(actual, expected, step_tolerance)
    # How far AdamW may move an entry: the scale of the errors of one that begins at zero.
    reach = LEARNING_RATE * len(expected.losses)
    for name, weight in expected.weights.items():
        error = float((actual.weights[name] - weight).abs().max())
        bound = max(TOLERANCE * float(weight.abs().max()), step_tolerance * reach)
        assert error <= bound, f"{name} is off by {error}"


def assert_same_inspection(actual: Outcome, expected: Outcome, step_tolerance: float) -> None:
    """Norms by block and group, largest logits, entropies, biases and loads, of which rank 0 has those of all ranks."""
    for part in ("blocks", "groups"):
        own, other = (flatten_numbers(outcome.inspected[part]) for outcome in (actual, expected))
        assert own.keys() == other.keys()
        for name in other:
            tolerance = max(STEP_NORM_TOLERANCE, step_tolerance) if name.startswith("update") else NORM_TOLERANCE
            assert own[name] == pytest.approx(other[name], rel=tolerance, abs=1e-8), f"{part} {name}"
    assert actual.inspected.get("experts") == expected.inspected.get("experts")


def assert_as_one_rank(layout: Layout) -> None:
    tolerance = MUON_TOLERANCE if layout.model in ("muon", "normuon") else TOLERANCE
    assert_same_training(outcome_of(layout), one_rank(layout.quick)[layout.model], tolerance)


def rows(quick: bool) -> list[Layout]:
    return [layout for layout in LAYOUTS if layout.quick == quick]


@pytest.mark.parametrize("layout", rows(quick=True), ids=lambda layout: layout.name)
def test_a_quick_layout_trains_as_one_rank(layout: Layout) -> None:
    assert_as_one_rank(layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", rows(quick=False), ids=lambda layout: layout.name)
def test_a_layout_trains_as_one_rank(layout: Layout) -> None:
    assert_as_one_rank(layout)


def test_a_step_whose_rows_have_no_room_is_computed_again_and_changes_no_bit(tmp_path: Path) -> None:
    rooms = (None, 1.0, 8.0)
    layouts = [Layout(2, {"expert": 2, "expert_buffer_factor": room}, "experts", quick=True) for room in rooms]
    counted, *others = run_ranks(run_all, layouts, tiny_data(tmp_path / "data"), str(tmp_path), num_ranks=2)[0]
    for other in others:
        assert (other.losses, other.grad_norms) == (counted.losses, counted.grad_norms)
        assert all(torch.equal(other.weights[name], weight) for name, weight in counted.weights.items())
    events = [(tmp_path / f"run{number}" / "events.jsonl").read_text().splitlines() for number in range(len(rooms))]
    recounts = [sum(json.loads(line)["event"] == "dispatch_overflow" for line in lines) for lines in events]
    assert recounts == [0, 1, 0], "rows are counted after one step, as they would not have fitted for eight"
