"""Every row of the fault table names tests that exist."""

from __future__ import annotations

from tests.faults.table import TABLE, Row, find_missing


def test_every_row_has_its_tests() -> None:
    assert {row.number: find_missing(row) for row in TABLE if find_missing(row)} == {}
    assert len({row.number for row in TABLE}) == len(TABLE)


def test_a_test_that_is_gone_is_noticed() -> None:
    assert find_missing(Row(0, "", "", ("tests/faults/test_table.py::test_gone",))) == [
        "tests/faults/test_table.py::test_gone"
    ]
