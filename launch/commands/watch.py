"""The verb that looks at a run from outside: watch.

The verb that lists runs: runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.console import plain, print_json, print_rows, say
from amfm.launch.existing import load_packaged
from amfm.pretrain.launcher_protocol import DONE, INTERRUPTED, RUN_FAILED

if TYPE_CHECKING:
    from amfm.pretrain.report.verdict import RunRow, Verdicts


LOOK_SECONDS = 1.0


def watch(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="The run directory; the run may be on any machine.")
    ],
    *,
    stay: Annotated[
        bool, typer.Option("--stay", help="Keep watching after the run has ended, until its next start.")
    ] = False,
    prometheus: Annotated[
        str | None,
        typer.Option(metavar="[HOST:]PORT", help="Serve /metrics for Prometheus instead; HOST defaults to 127.0.0.1."),
    ] = None,
    otlp: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Post metrics to an OpenTelemetry collector every 15 seconds instead (OTLP over HTTP)."
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit code 3 also if the run needs a look: for scripts and cron.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """The verb `watch`.

    Only reads. Ends with the run: exit code 0 when it finished or was stopped, 3 when it failed or is gone. With --json
    prints what is now, once, with the verdict of the report: whether the run is well, and why not.
    """
    from amfm.pretrain.monitor.follow import FollowedRun
    from amfm.pretrain.report.verdict import Verdicts

    if sum((prometheus is not None, otlp is not None, as_json)) > 1:
        raise ValueError(
            "--prometheus and --otlp run until they are interrupted, and --json prints once; give one of them"
        )
    is_serving = prometheus is not None or otlp is not None
    metrics = load_packaged("watch.metrics", "serve", "prometheus") if is_serving else None
    run = FollowedRun(run_dir)
    verdicts = Verdicts(run)
    try:
        if metrics is not None:
            metrics(verdicts, prometheus, otlp)
        elif as_json:
            seen = run.final()
            verdict = verdicts.of(seen)
            print_json(run.to_json(seen) | {"health": verdict and verdict.to_json()})
        else:
            show_live(verdicts, stays=stay)
    except KeyboardInterrupt:
        say(f"amfm: no longer watching {run_dir}; the run is not touched")
        raise typer.Exit(INTERRUPTED) from None
    needs_a_look = strict and verdicts.newest is not None and bool(verdicts.newest.findings)
    raise typer.Exit(RUN_FAILED if run.state in ("failed", "lost") or needs_a_look else DONE)


def show_live(verdicts: Verdicts, *, stays: bool) -> None:
    """Show a run until it ends: a panel on a terminal, lines anywhere else, warnings about events and the verdict in both."""
    from rich.console import Console

    from amfm.pretrain.monitor.follow import follow
    from amfm.pretrain.monitor.live import LivePanel
    from amfm.pretrain.monitor.panel import choose_bars

    run = verdicts.run
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    run.panel.bars = choose_bars(console.encoding)
    live = LivePanel(console, lambda: run.panel.draw(console.width)) if console.is_terminal else None
    printer = live or console
    said = judged = ""
    is_first = True
    if live is not None:
        live.start()
    try:
        for seen in follow(run, every_seconds=LOOK_SECONDS, stays=stays):
            every = run.config.train.log_every_steps if run.config is not None else 1
            due = [line for line in seen.metrics if run.panel.is_line_due(line, every)]
            for line in seen.metrics[-1:] if is_first else due:
                if live is None:
                    printer.print(plain(run.panel.format_line(line)))
            for event in () if is_first else seen.events:
                printer.print(plain(f"{event.get('event')} at step {event.get('step')}"))
            if live is None and seen.state != said:
                printer.print(plain(f"{run.directory}: {run.panel.status}"))
                said = seen.state
            verdict = verdicts.of(seen)
            run.panel.verdict = "" if verdict is None else verdict.words()
            if live is None and run.panel.verdict != judged:
                printer.print(plain(f"{run.directory}: {run.panel.verdict}"))
                judged = run.panel.verdict
            is_first = False
    finally:
        if live is not None:
            live.close()


HEALTH_WIDTH = 60  # of the table; --json and amfm watch have all of it
Column = Literal["run", "state", "step", "loss", "best", "tokens", "tokens_per_second", "seconds", "last_time"]


def runs(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The folder that contains run directories, at any depth.")
    ],
    *,
    sort: Annotated[
        Column, typer.Option(help="Order of the rows; last_time: when the run last wrote an event or a step.")
    ] = "last_time",
    reverse: Annotated[bool, typer.Option("--reverse", help="The other way round: largest, or newest, first.")] = False,
    as_json: JsonOption = False,
) -> None:
    """The verb `runs`.

    A row per run: state, step, loss, lowest validation loss, tokens, speed, time on its machines, newest event and whether it is
    well. Runs without a step come last.
    """
    from amfm.pretrain.report.verdict import find_runs, read_row, sort_rows

    found, damaged = [], []
    for directory in find_runs(folder):
        try:
            found.append(read_row(directory, folder))
        except ValueError as error:
            damaged.append({"run": str(directory.relative_to(folder)), "error": str(error)})
    if not found and not damaged:
        raise ValueError(f"{folder} holds no run directory; give the folder above run.dir of runs that were started")
    rows = sort_rows(found, sort, reverse=reverse)
    for each in damaged:
        say(f"amfm: {each['run']} cannot be read: {each['error']}")
    if as_json:
        print_json({"runs": [row.to_json() for row in rows], "damaged": damaged})
        return
    columns = ("run", "state", "step", "loss", "best validation", "tokens", "tokens/s", "time", "last event", "health")
    print_rows(f"{len(rows)} runs of {folder}", columns, [describe_row(row) for row in rows])


def describe_row(row: RunRow) -> tuple[str, ...]:
    """Cells of a row."""
    from amfm.pretrain.monitor.panel import format_duration, show_number, since
    from amfm.pretrain.report.numbers import count

    best = "-" if row.best is None else f"{row.best:.4f} at {row.best_step:,}"
    last = "-" if row.last_time is None else f"{row.last_event}, {since(row.last_time)} ago"
    return (
        row.run,
        row.state,
        f"{row.step:,} of {row.steps:,}",
        show_number(row.loss, ".4f"),
        best,
        "-" if row.tokens is None else count(row.tokens),
        "-" if row.tokens_per_second is None else count(row.tokens_per_second),
        "-" if row.seconds is None else format_duration(row.seconds),
        last,
        row.health if len(row.health) <= HEALTH_WIDTH else f"{row.health[: HEALTH_WIDTH - 3]}...",
    )


def add_verbs(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    app.command(epilog="Example: amfm watch runs/tiny_cpu")(watch)
    app.command(epilog="Example: amfm runs runs --sort best")(runs)
