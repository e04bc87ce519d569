"""The uses of a run's time have places on the clock, and as much time in all as goodput counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from amfm.pretrain.report.data import read_run
from amfm.pretrain.report.goodput import COLUMNS, find_stretches, make_timeline, measure_goodput
from amfm.pretrain.report.report import write_report
from tests.pretrain.report.synthetic import ORIGIN, one_step, sick, staged
from tests.pretrain.report.test_report import line, make_run


@pytest.mark.parametrize(
    "make", [sick, one_step, lambda folder: staged(folder, 600)], ids=["sick", "one step", "staged"]
)
def test_stretches_do_not_overlap_and_their_sums_are_those_of_goodput(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    record = read_run(make(tmp_path))
    stretches = sorted(find_stretches(record))
    assert all(before[1] <= after[0] + 1e-6 for before, after in pairwise(stretches))
    found = Counter[str]()
    for begin, end, use in stretches:
        found[use] += end - begin
    use = measure_goodput(record)
    assert use is not None
    assert dict(found) == pytest.approx(
        {name: seconds for name, seconds in use.parts().items() if seconds > 1e-6}, abs=1e-3
    )


def test_what_was_lost_is_where_the_clock_had_it(tmp_path: Path) -> None:
    run = sick(tmp_path)
    timeline = make_timeline(read_run(run))
    assert timeline is not None and timeline.begin == ORIGIN
    seconds = (timeline.end - timeline.begin) / COLUMNS
    failed = next(place for place, kind, _ in timeline.marks if kind == "failure") * COLUMNS
    waited = [column for column, share in enumerate(timeline.columns["waiting"]) if share]
    done_again = [column for column, share in enumerate(timeline.columns["again"]) if share and column <= failed + 1]
    assert done_again[-1] == pytest.approx(failed, abs=3) and waited[0] == pytest.approx(failed, abs=3)
    assert len(waited) * seconds == pytest.approx(32, abs=2 * seconds)
    page = write_report([run]).read_text()
    assert page.count('title="failed"') == 1 and "<title>waiting for a restart</title>" in page


def test_a_run_without_times_has_no_timeline(tmp_path: Path) -> None:
    run = make_run(tmp_path, [line(step) for step in range(1, 30)])
    assert make_timeline(read_run(run)) is None
    assert 'class="panel clock"' not in write_report([run]).read_text()
