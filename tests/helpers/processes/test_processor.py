"""Which runs are judged too expensive, which files grew, and in which order files run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.helpers.processes.processor import RECORD, Seconds, grown_most, judge, longest_first, read_record

RECORDED = Seconds(1000.0, 0.020)


@pytest.mark.parametrize(
    ("found", "is_over", "said"),
    [
        (Seconds(1090.0, 0.020), False, "limit 1100 s"),
        (Seconds(1110.0, 0.020), True, "limit 1100 s"),
        # A slower processor: as many seconds more as its sample takes.
        (Seconds(1300.0, 0.025), False, "1040 s scaled"),
        (Seconds(1400.0, 0.025), True, "1120 s scaled"),
        (Seconds(9000.0, 0.027), False, "not judged: this processor is too different"),
        # A faster one is not asked for more than what was recorded.
        (Seconds(900.0, 0.010), False, "1800 s scaled"),
        (Seconds(1500.0, 0.020, others=151.0), False, "not judged: other programs took 151 s"),
    ],
)
def test_a_run_is_too_expensive_by_its_own_work_and_not_by_its_machine(
    found: Seconds, is_over: bool, said: str
) -> None:
    text, verdict = judge(found, RECORDED)
    assert verdict is is_over and said in text


def test_files_that_grew_most_are_listed_with_seconds_of_the_same_processor() -> None:
    now = {"a.py": 12.0, "b.py": 3.0, "new.py": 2.0, "c.py": 1.0}
    assert grown_most(now, {"a.py": 2.0, "b.py": 1.5, "c.py": 4.0}, scale=0.5) == [
        "  +4.0 s  a.py (2.0 s before)",
        "  +1.0 s  new.py (0.0 s before)",
    ]


def test_the_longest_files_run_first_and_whole() -> None:
    items = [SimpleNamespace(nodeid=name) for name in ("a.py::1", "b.py::1", "b.py::2", "c.py::1", "d.py::1")]
    longest_first(items, {"b.py": 3.0, "d.py": 9.0})
    assert [item.nodeid for item in items] == ["d.py::1", "b.py::1", "b.py::2", "a.py::1", "c.py::1"]


def test_the_record_is_of_files_that_there_are() -> None:
    recorded, files = read_record()
    assert recorded.counted > 0 and recorded.sample > 0 and files
    assert [file for file in files if not (RECORD.parents[1] / file).is_file()] == []
