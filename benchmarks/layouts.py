"""The table of docs/layouts.md: for presets of each size the fastest layout that `amfm plan --search` finds.

`python -m benchmarks.layouts --search NAME --gpus 64 --write docs/layouts.md` searches on H100 with the defaults of
`amfm plan configs/NAME.yaml --gpus 64 --gpu h100 --search`, of the first training stage only, and puts one row into the page.
With `--nearby` each axis is at most halved or doubled from the preset's layout, which is a tenth of the combinations of a
large model. A pattern that is cut at `|` is searched without. Rows that were searched stay in the page; a preset that was not
searched for the GPUs of its header, or whose own layout is faster, has the layout of its file and the numbers of its header
(`python -m tests.launch.plan.presets` writes headers). Nothing is measured.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from amfm.launch.console import print_rows, say, show_progress
from amfm.launch.plan.estimate import Assumptions, Estimate
from amfm.launch.plan.hardware import GIB, HARDWARE
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.plan import counted
from amfm.launch.plan.ranking import rank_layouts
from amfm.launch.plan.search import all_layouts, with_layout
from amfm.model.flops import count_parameters
from amfm.pretrain.checks.load import load_checked
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.stages import resolve_stages
from benchmarks.command import main

Row = tuple[str, ...]
COLUMNS = ("preset", "parameters", "active", "GPUs", "found by", "layout", "GiB per GPU", "MFU")
SEARCHED, NEARBY, OWN = "search", "search nearby", "preset"
AXES = ("tensor", "expert", "context", "pipeline")
HEADER = re.compile(
    r"for ([\d,]+) H100, planned by `amfm plan`: ([\d.]+) GiB at most per GPU with 10% headroom, ([\d.]+%) MFU"
)
TABLE = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- end of the table -->)", re.DOTALL)


def describe_layout(config: RunConfig) -> str:
    """The settings of a layout that differ from their defaults, as overrides without their section."""
    settings = config.parallel.model_dump(mode="json", exclude_defaults=True)
    settings |= {name: getattr(config.train, name) for name in ("micro_batch_size", "recompute", "recompute_blocks")}
    words = (f"{name}={str(value).lower()}" for name, value in settings.items() if value not in ("none", None, ""))
    return " ".join(words)


def row_of(name: str, config: RunConfig, gpus: str, found_by: str, gib: str, mfu: str) -> Row:
    """The cells of a preset with its layout."""
    counts = count_parameters(config.model)
    sizes = tuple(f"{n / 1e6:.1f}M" if n < 5e8 else f"{n / 1e9:.1f}B" for n in (counts.total, counts.active))
    return (name, *sizes, gpus, found_by, f"`{describe_layout(config)}`", gib, mfu)


def searched_row(name: str, config: RunConfig, best: Estimate, found_by: str = SEARCHED) -> Row:
    """The cells of a layout that a search found."""
    gib, mfu = f"{best.memory.total() / GIB:.1f}", f"{best.mfu:.1%}"
    return row_of(name, with_layout(config, best.layout), f"{best.layout.ranks:,}", found_by, gib, mfu)


def is_near(layout: Layout, own: Layout) -> bool:
    """Whether each axis of a layout is that of another one, its half or its double."""
    return all(getattr(own, axis) <= 2 * getattr(layout, axis) <= 4 * getattr(own, axis) for axis in AXES)


def search(folder: Path, name: str, gpus: int, *, nearby: bool = False) -> Row:
    """The row of the fastest layout of a preset's first training stage. Raises ValueError if none fits."""
    hardware = HARDWARE["h100"]
    run = resolve_stages(load_checked(folder / f"{name}.yaml", []))[0].config
    own, model = Layout.of(run, gpus), run.model
    uncut = model.model_copy(update={"pattern": model.pattern.replace("|", "")})
    run = run.model_copy(update={"model": uncut})
    layouts = [
        layout for layout in all_layouts(run, gpus, hardware.gpus_per_node) if not nearby or is_near(layout, own)
    ]
    with show_progress(f"layouts of {name}", every_seconds=10) as progress:
        tried = counted(layouts, progress)
        best = rank_layouts(run, [run], tried, hardware, Assumptions(), recomputes=True).nearest
    if best is None or not best.fits():
        raise ValueError(f"--search {name}: no layout fits on {gpus} H100; give more with --gpus")
    return searched_row(name, run, best, NEARBY if nearby else SEARCHED)


def read_presets(folder: Path) -> list[Row]:
    """The row of each preset whose header has a plan."""
    rows = []
    for path in sorted(folder.glob("*.yaml")):
        words = " ".join(line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#")
        if planned := HEADER.search(words):
            rows.append(row_of(path.stem, load_checked(path, []), planned[1], OWN, planned[2], planned[3]))
    return rows


def read_table(page: Path) -> list[Row]:
    """The rows of the page's table. Raises ValueError if the page has no place for it."""
    table = TABLE.search(page.read_text(encoding="utf-8"))
    if table is None:
        raise ValueError(f"{page} has no lines <!-- table --> and <!-- end of the table -->; use docs/layouts.md")
    lines = [tuple(line.strip("| ").split(" | ")) for line in table[0].strip().splitlines()]
    return lines[2:]


def write_table(page: Path, rows: list[Row]) -> None:
    """Put rows into the page's table. Raises ValueError if the page has no place for it."""
    read_table(page)
    lines = (COLUMNS, ("---",) * len(COLUMNS), *rows)
    table = "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + "\n"
    page.write_text(TABLE.sub(lambda _: table, page.read_text(encoding="utf-8")), encoding="utf-8")


def joined(own: list[Row], searched: list[Row]) -> list[Row]:
    """Rows by size and GPUs: for a preset on as many GPUs the faster of those that were searched and its own."""
    found = {(row[0], row[3]): row for row in own}
    for row in searched:
        before = found.setdefault((row[0], row[3]), row)
        if before[4] != OWN or float(row[-1].rstrip("%")) >= float(before[-1].rstrip("%")):
            found[row[0], row[3]] = row
    sizes = {"M": 1e6, "B": 1e9}
    return sorted(
        found.values(),
        key=lambda row: (float(row[1][:-1]) * sizes[row[1][-1]], row[0], int(row[3].replace(",", ""))),
    )


def layouts(
    presets: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the presets are.")] = Path("configs"),
    *,
    search_for: Annotated[
        list[str] | None, typer.Option("--search", metavar="NAME", help="Search this preset.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="With --search: number of H100.")] = 8,
    nearby: Annotated[bool, typer.Option("--nearby", help="With --search: near the preset's layout only.")] = False,
    write: Annotated[Path | None, typer.Option(metavar="PAGE", help="Write the table into this page.")] = None,
) -> None:
    """Print the layouts of presets by size, with what the plan predicts for them."""
    kept = [row for row in read_table(write) if row[4] != OWN] if write is not None else []
    rows = joined(
        read_presets(presets), [*kept, *(search(presets, name, gpus, nearby=nearby) for name in search_for or ())]
    )
    if write is not None:
        write_table(write, rows)
        say(f"wrote {write}")
    print_rows("Layouts of presets on H100", COLUMNS, rows)


if __name__ == "__main__":
    main(layouts)
