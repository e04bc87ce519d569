"""The table of docs/layouts.md: presets of each size with the layout that `amfm plan --search` found for them.

The layout is the one of the preset's file, and GPUs, memory and MFU are those of the header that `amfm plan` predicts for it
(`python -m tests.launch.plan.presets` writes headers), so nothing is measured or searched here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from amfm.launch.console import print_rows, say
from amfm.model.flops import count_parameters
from amfm.pretrain.checks.load import load_checked
from amfm.pretrain.config.schema import RunConfig
from benchmarks.command import main

COLUMNS = ("preset", "parameters", "active", "GPUs", "layout", "GiB per GPU", "MFU")
HEADER = re.compile(
    r"for ([\d,]+) H100, planned by `amfm plan`: ([\d.]+) GiB at most per GPU with 10% headroom, ([\d.]+%) MFU"
)
TABLE = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- end of the table -->)", re.DOTALL)


def describe_layout(config: RunConfig) -> str:
    """The settings of a layout that differ from their defaults, as overrides."""
    settings = config.parallel.model_dump(mode="json", exclude_defaults=True)
    settings |= {name: getattr(config.train, name) for name in ("micro_batch_size", "recompute")}
    words = (f"{name}={str(value).lower()}" for name, value in settings.items() if value not in ("none", None))
    return " ".join(words)


def read_presets(folder: Path) -> list[tuple[str, ...]]:
    """A row for each preset whose header has a plan, by the number of its parameters."""
    rows = []
    for path in sorted(folder.glob("*.yaml")):
        words = " ".join(line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#")
        if planned := HEADER.search(words):
            config = load_checked(path, [])
            counts = count_parameters(config.model)
            sizes = tuple(f"{n / 1e6:.1f}M" if n < 5e8 else f"{n / 1e9:.1f}B" for n in (counts.total, counts.active))
            cells = (path.stem, *sizes, planned[1], f"`{describe_layout(config)}`", planned[2], planned[3])
            rows.append((counts.total, cells))
    return [cells for _, cells in sorted(rows)]


def write_table(page: Path, rows: list[tuple[str, ...]]) -> None:
    """Put rows into the page's table. Raises ValueError if the page has no place for it."""
    text = page.read_text(encoding="utf-8")
    if TABLE.search(text) is None:
        raise ValueError(f"{page} has no lines <!-- table --> and <!-- end of the table -->; use docs/layouts.md")
    lines = (COLUMNS, ("---",) * len(COLUMNS), *rows)
    table = "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + "\n"
    page.write_text(TABLE.sub(lambda _: table, text), encoding="utf-8")


def layouts(
    presets: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the presets are.")] = Path("configs"),
    *,
    write: Annotated[Path | None, typer.Option(metavar="PAGE", help="Write the table into this page.")] = None,
) -> None:
    """Print the layouts of presets by size, with what the plan predicts for them."""
    rows = read_presets(presets)
    if write is not None:
        write_table(write, rows)
        say(f"wrote {write}")
    print_rows("Layouts of presets on H100", COLUMNS, rows)


if __name__ == "__main__":
    main(layouts)
