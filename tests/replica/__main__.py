"""Prints the tables of docs/replica.md: `python -m tests.replica [CLASS ...]`, of all classes by default."""

from __future__ import annotations

import sys

from tests.replica.families import FAMILIES
from tests.replica.faults import PLANTED
from tests.replica.runs import LAYOUTS, Comparison, name_of, trained
from tests.replica.test_replica import FEW


def words(found: Comparison) -> str:
    """A cell: largest gaps of loss and norm, and where a choice differed."""
    gaps = f"{found.loss:.0e} / {found.norm:.0e}"
    return gaps if found.tie is None else f"{gaps} to step {found.steps}, then a tie of {found.tie:.0e}"


def main(names: list[str]) -> None:
    """Print a row for each class and layout, then one for each fault."""
    print("| class | layout | largest gap of loss / gradient norm | agrees |\n|---|---|---|---|", flush=True)
    for name in names or FAMILIES:
        for num_ranks, layouts in LAYOUTS.items():
            for layout, found in zip(layouts, trained(name).compare_runs(layouts, num_ranks), strict=True):
                verdict = "yes" if found.agrees else "NO"
                print(f"| `{name}` | {name_of(layout)} | {words(found)} | {verdict} |", flush=True)
    if names:
        return
    print(
        "\n| planted fault | class | layout | gap of loss / gradient norm | seen |\n|---|---|---|---|---|", flush=True
    )
    for fault, name, num_ranks, layout in PLANTED:
        (found,) = trained(name, FEW).compare_runs([layout], num_ranks, fault)
        verdict = "NO" if found.agrees else "yes"
        print(f"| `{fault}` | `{name}` | {name_of(layout)} | {words(found)} | {verdict} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
