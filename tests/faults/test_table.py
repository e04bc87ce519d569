"""Every row of the fault table names tests that exist."""

from __future__ import annotations

from pathlib import Path

from tests.faults.table import TABLE, Row, find_missing, find_tests, judge, read_outcomes


def test_every_row_has_its_tests() -> None:
    assert {row.number: find_missing(row) for row in TABLE if find_missing(row)} == {}
    assert len({row.number for row in TABLE}) == len(TABLE)


def test_a_test_that_is_gone_is_noticed() -> None:
    assert find_missing(Row(0, "", "", ("tests/faults/test_table.py::test_gone",))) == [
        "tests/faults/test_table.py::test_gone"
    ]


def test_what_is_run_is_what_the_table_names() -> None:
    found = find_tests()
    for test in (test for row in TABLE for test in row.tests):
        assert any(name.startswith(test) or name == test.partition("::")[0] for name in found), test


def test_verdicts_of_two_suites_are_one(tmp_path: Path) -> None:
    case = '<testcase classname="tests.faults.test_x" name="{}">{}</testcase>'
    quick = [case.format("test_a[1]", ""), case.format("test_b", "<skipped/>"), case.format("test_c", "<skipped/>")]
    slow = [case.format("test_a[1]", "<failure/>"), case.format("test_b", "")]
    reports = [tmp_path / "quick.xml", tmp_path / "slow.xml"]
    for report, cases in zip(reports, (quick, slow), strict=True):
        report.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    outcomes = read_outcomes(reports)
    verdicts = [judge(Row(0, "", "", (f"tests/faults/test_x.py::test_{name}",)), outcomes) for name in "abcd"]
    assert verdicts == ["FAILED", "shown", "not run", "not run"]
