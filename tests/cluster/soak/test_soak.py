"""The soak's own rules: the seed decides the faults, and what is not as it must be is found."""

from __future__ import annotations

import itertools
from pathlib import Path

from tests.cluster.cluster import FAKE_CLOCK
from tests.cluster.soak.__main__ import find_failure, print_soak, summarize
from tests.cluster.soak.faults import KINDS, draw_faults
from tests.cluster.soak.injector import Goodput, Onlooker
from tests.cluster.soak.site import STEPS
from tests.cluster.soak.soak import Round, Strike
from tests.soak.picture import draw_soak


def test_the_seed_alone_decides_the_faults_and_each_kind_comes_before_one_comes_again() -> None:
    kinds = [kind for kind in KINDS if FAKE_CLOCK or "clock" not in kind]
    one, same, other = (list(itertools.islice(draw_faults(seed), 2 * len(kinds))) for seed in (1, 1, 2))
    assert one == same != other
    for half in (one[: len(kinds)], one[len(kinds) :]):
        assert sorted(fault.kind for fault in half) == sorted(kinds)


def test_a_difference_a_leftover_and_a_goodput_that_is_off_fail_a_soak(tmp_path: Path) -> None:
    found = Round(0, "run 0", starts=2, ended=True, goodput=Goodput(0.5, 100.0, 0.505, 99.0, 0.49))
    found.strikes = [Strike("rank killed", "the rank on node1", 60.0, 12, 1, again=2, without=31.0)]
    found.trail = [(0.0, 0), (60.0, 12)]
    assert find_failure([found]) == ""
    draw_soak([found], "Soak", tmp_path / "soak.svg", KINDS, STEPS)
    assert "rank killed (1)" in (tmp_path / "soak.svg").read_text()
    print_soak([found], summarize([found], 1, ""))
    found.goodput = Goodput(0.5, 100.0, 0.515, 99.0, 0.49)
    assert find_failure([found]) == "run 0: goodput 50.0%, 51.5% by the clock"
    found.left = ["node1: /dev/shm/amfm-1"]
    assert find_failure([found]) == "run 0: node1: /dev/shm/amfm-1 is left"
    found.differences = ["step 3: ..."]
    assert find_failure([found]) == "run 0: step 3: ..."


def test_an_onlooker_counts_steps_by_their_lines_and_first_ones_and_saves_as_the_others() -> None:
    moments = {8: (5.0, 1), 9: (6.0, 1), 10: (7.0, 1), 11: (10.0, 1), 12: (60.0, 2), 13: (61.0, 2), 14: (65.0, 2)}
    onlooker = Onlooker(seen=dict(moments))
    assert onlooker.spans() == [(9, 1.0), (10, 1.0), (11, 3.0), (13, 1.0), (14, 4.0)]
    assert (onlooker.pace(), onlooker.useful()) == (1.0, 8.0 + 2 * 1.0)
