"""`amfm bench export`: what memory exports and imports take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_rows, say


def export(
    path: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="The configuration, or run, whose model it is.")
    ] = Path("configs/ladder_1b_a300m.yaml"),
    *,
    times: Annotated[str, typer.Option(metavar="1,3", help="Its blocks so many times over; one row each.")] = "1,3",
    folder: Annotated[Path | None, typer.Option(help="A folder on the disk to use; default: /tmp.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Export and import a model and a deeper one, without the proof, and print the peaks of memory.

    The disk needs twice the larger model in float32.
    """
    from amfm.launch.bench.export import bench_export
    from amfm.launch.bench.models import read_model

    numbers = [int(text) if text.isdecimal() else 0 for text in times.split(",")]
    if not all(numbers):
        raise ValueError(f"--times {times} must be whole numbers from 1 on with commas between them, such as 1,3")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    result = bench_export(read_model(path), numbers, folder, report=say)
    if as_json:
        print_json(result)
    else:
        print_export_table(result)


def print_export_table(result: dict[str, Any]) -> None:
    """Print a row a model, and the hardware."""
    rows = [
        (
            f"{row['parameters'] / 1e9:.2f}B",
            f"{row['bytes'] / 2**30:.1f}",
            *(
                cell
                for verb in ("export", "import")
                for cell in (f"{row[verb]['peak_bytes'] / 2**20:,.0f}", f"{row[verb]['seconds']:.0f}")
            ),
        )
        for row in result["rows"]
    ]
    columns = ("parameters", "float32 GiB", "export peak MiB", "export s", "import peak MiB", "import s")
    print_rows("Memory of exports and imports", columns, rows)
    say(", ".join(f"{name} {value}" for name, value in result["hardware"].items()))
