"""Verbs about a run: report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.cli_config import JsonOption
from launch.console import print_json, print_pairs


def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The directory of a run, finished or not.")],
    *,
    as_json: JsonOption = False,
) -> None:
    """Write RUN_DIR/report.html: one self-contained page with curves, expert load, events and configuration."""
    from pretrain.report import write_report

    page = write_report(run_dir)
    if as_json:
        print_json({"report": str(page), "bytes": page.stat().st_size})
    else:
        print_pairs("Report", [("page", page), ("kilobytes", f"{page.stat().st_size / 1e3:.0f}")])


def add_verbs(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    app.command(epilog="Example: amfm report runs/tiny_cpu")(report)
