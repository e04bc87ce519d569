"""Every row of the fault table names tests that exist."""

from __future__ import annotations

from tests.faults.table import TABLE, Row, find_missing, find_tests


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
