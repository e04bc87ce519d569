"""The arguments of Megatron-LM that concern pretraining, and the settings that do the same: the rows of flags.txt.

The one place of these facts: `amfm import megatron-args` writes settings by it, `amfm import` of a checkpoint compares by
it, and docs/from_megatron.md is made of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

FILE = Path(__file__).with_name("flags.txt")
Effect = Literal["w", "t", "-"]
# Prefixes of flags that turn something off.
OFF = ("no_", "disable_")


@dataclass(frozen=True)
class Row:
    """Arguments that share everything. `default`: there; `kind`: `=`, `~`, `only V`, `always` or `none`; `users`: who would miss them."""

    section: str
    effect: Effect
    names: tuple[str, ...]
    default: Any
    settings: tuple[str, ...]
    kind: str
    users: str
    note: str

    @property
    def only(self) -> Any:
        """The value that means the same here, of kind `only V`."""
        return yaml.safe_load(self.kind.removeprefix("only "))

    def default_of(self, name: str) -> Any:
        """The default of one of the arguments: one for the row, or by name."""
        return self.default.get(name) if isinstance(self.default, dict) else self.default

    def is_equal(self, name: str, value: Any) -> bool:
        """Whether a value asks for nothing that is missing here: the one value, or what is the default or off there."""
        if self.kind.startswith("only "):
            return same(value, self.only)
        return self.kind != "none" or not value or same(value, self.default_of(name))


@dataclass(frozen=True)
class Table:
    """All rows by argument, and other spellings with the argument and value that they mean (None: the value given)."""

    rows: tuple[Row, ...]
    by_name: Mapping[str, Row]
    spellings: Mapping[str, tuple[str, Any]]

    def resolve(self, name: str, value: Any) -> tuple[str, Any]:
        """The argument and value that a spelling means, with `-` or `_`, or turned off by `no-`."""
        name = name.lstrip("-").replace("-", "_")
        if name in self.spellings:
            argument, fixed = self.spellings[name]
            return argument, value if fixed is None else fixed
        for prefix in OFF:
            short = name.removeprefix(prefix)
            if name not in self.by_name and short != name and short in self.by_name and value is True:
                return short, False
        return name, value

    def default(self, name: str) -> Any:
        """The default there; None if it has none, or the argument is not known."""
        row = self.by_name.get(name)
        return None if row is None else row.default_of(name)


@cache
def read_table() -> Table:
    """Read the file."""
    rows: list[Row] = []
    spellings: dict[str, tuple[str, Any]] = {}
    section = ""
    for line in FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("@ "):
            name, argument, *value = line[2:].split()
            spellings[name] = (argument, yaml.safe_load(value[0]) if value else None)
        elif line and not line.startswith("#"):
            effect, names, default, settings, kind, users, note = (part.strip() for part in line.split("|"))
            found = tuple(part.strip(",") for part in settings.split())
            rows.append(
                Row(section, effect, tuple(names.split()), yaml.safe_load(default), found, kind, users, note)  # type: ignore[arg-type]
            )
    return Table(tuple(rows), {name: row for row in rows for name in row.names}, spellings)


def same(left: Any, right: Any) -> bool:
    """Whether two values are one: numbers within rounding, others as they are."""
    if isinstance(left, bool) or isinstance(right, bool) or not _are_numbers(left, right):
        return bool(left == right)
    if left == right:
        return True
    return abs(left - right) <= 1e-9 * max(abs(left), abs(right))


def _are_numbers(*values: Any) -> bool:
    """Whether all are numbers."""
    return all(isinstance(value, int | float) for value in values)
