"""The drawing of a pipeline keeps the rules of its schedule."""

from itertools import pairwise

import pytest

from amfm.launch.plan.layout import Layout
from amfm.launch.plan.picture import make_timetable


def layout(ranks: int, schedule: str, pieces: int = 1) -> Layout:
    return Layout(ranks, 1, 1, pipeline=ranks, schedule=schedule, virtual_stages=pieces)


@pytest.mark.parametrize(("schedule", "pieces"), [("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1)])
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_pass_happens_once_after_what_it_needs_and_alone_on_its_rank(ranks, schedule, pieces):
    slots = make_timetable(layout(ranks, schedule, pieces), 8)
    kinds = 3 if schedule == "zero_bubble" else 2
    assert len(slots) == len({(slot.rank, slot.piece, slot.kind, slot.micro_batch) for slot in slots})
    assert len(slots) == kinds * ranks * pieces * 8
    done = {(slot.kind, slot.piece * ranks + slot.rank, slot.micro_batch): slot.stop for slot in slots}
    for slot in slots:
        stage = slot.piece * ranks + slot.rank
        if slot.kind == "forward" and stage > 0:
            assert slot.start >= done["forward", stage - 1, slot.micro_batch]
        if slot.kind == "backward" and stage < ranks * pieces - 1:
            assert slot.start >= done["backward", stage + 1, slot.micro_batch]
        if slot.kind == "weights":
            assert slot.start >= done["backward", stage, slot.micro_batch]
    for rank in range(ranks):
        own = sorted((slot.start, slot.stop) for slot in slots if slot.rank == rank)
        assert all(stop <= start + 1e-9 for (_, stop), (start, _) in pairwise(own))


def test_a_rank_waits_as_long_as_the_plan_says():
    # 1F1B waits (ranks - 1) passes; cutting backward passes leaves a third, pieces divide the wait.
    ends = {
        name: max(slot.stop for slot in make_timetable(layout(4, name, pieces), 16)) - 16
        for name, pieces in (("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1))
    }
    assert ends["1f1b"] == pytest.approx(3)
    assert ends["interleaved"] == pytest.approx(1.5)
    assert ends["zero_bubble"] == pytest.approx(1)
