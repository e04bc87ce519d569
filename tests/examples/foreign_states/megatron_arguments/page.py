"""The tables of docs/from_megatron.md, made of the table: `python -m tests.examples.foreign_states.megatron_arguments.page PAGE`."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import groupby
from pathlib import Path

from amfm_foreign_states.megatron_arguments.table import Row, read_table
from amfm_foreign_states.megatron_arguments.write import flag

BEGIN, END = "<!-- made by page.py: begin -->", "<!-- made by page.py: end -->"


def flag_tables() -> str:
    """All arguments by section: flags, settings, how they compare, who would miss them, what differs."""
    rows = read_table().rows
    counts = Counter(word(row) for row in rows for _ in row.names)
    lines = [f"{counts['=']} arguments are equal, {counts['differs']} differ, {counts['missing']} are missing.", ""]
    for section, members in groupby(rows, key=lambda row: row.section):
        lines += [f"### {section}", "", "| Megatron-LM | default | amfm | | users | |", "|---|---|---|---|---|---|"]
        lines += [table_row(row) for row in members]
        lines.append("")
    return "\n".join(lines)


def word(row: Row) -> str:
    """How a row compares: `=`, differs or missing."""
    if row.kind in ("=", "always"):
        return "="
    return "missing" if row.kind == "none" or row.kind.startswith("only ") else "differs"


def table_row(row: Row) -> str:
    """A row of Markdown."""
    flags = ", ".join(f"`{flag(name)}`" for name in row.names)
    default = "" if row.default is None or isinstance(row.default, dict) else f"`{row.default}`"
    settings = ", ".join(f"`{setting}`" for setting in row.settings)
    only = f"only `{row.only}`" if row.kind.startswith("only ") else ""
    note = "; ".join(part for part in (only, row.note) if part)
    return f"| {flags} | {default} | {settings} | {word(row)} | {row.users} | {note} |"


def renew(page: str) -> str:
    """A page with the tables between its marks made again."""
    head, _, rest = page.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{flag_tables()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(renew(target.read_text(encoding="utf-8")), encoding="utf-8")
