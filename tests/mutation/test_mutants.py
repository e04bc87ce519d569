"""Mutants are small, compile and are told apart; rooms name what is there."""

from __future__ import annotations

from pathlib import Path

from tests.mutation.mutants import mutants_of
from tests.mutation.rooms import ROOMS

ROOT = Path(__file__).parents[2]
SOURCE = '''"""A sum of 1 + 1."""

def total(values: list[int | None], start: int = 0) -> int:
    if not values or start < 0:
        raise ValueError(f"{len(values) + 1} values")
    log.write("größer")
    return start + sum(value for value in values if value is not None)
'''


def test_mutants_of_a_function_by_hand() -> None:
    changes = [(mutant.line, mutant.before, mutant.after) for mutant in mutants_of(SOURCE)]
    assert changes == [
        (3, "0", "1"),
        (4, "not values", "(values)"),
        (4, "not values or start < 0", "(False)"),
        (4, "not values or start < 0", "(True)"),
        (4, "not values or start < 0", "(not values and start < 0)"),
        (4, "not values or start < 0", "(not values)"),
        (4, "not values or start < 0", "(start < 0)"),
        (4, "start < 0", "(start <= 0)"),
        (4, "0", "1"),
        (6, 'log.write("größer")', "pass"),
        (7, "start + sum(value for value in values if value is not None)", "(start - sum((value for value in values if value is not None)))"),
        (7, "value is not None", "(value is None)"),
    ]  # fmt: skip
    for mutant in mutants_of(SOURCE):
        changed = mutant.apply(SOURCE)
        assert changed != SOURCE and compile(changed, "mutant", "exec")
        assert changed.count("\n") == SOURCE.count("\n")


def test_rooms_name_files_that_are_there() -> None:
    named = [name for room in ROOMS.values() for name in (*room.sources, *room.tests, *room.wider)]
    assert [name for name in named if "/" in name and not (ROOT / name.partition("::")[0]).exists()] == []
