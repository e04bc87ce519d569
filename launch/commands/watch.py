"""The verb that looks at a run from outside: watch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.console import plain, print_json, say
from amfm.pretrain.launcher_protocol import DONE, INTERRUPTED, RUN_FAILED

if TYPE_CHECKING:
    from amfm.pretrain.monitor.follow import FollowedRun

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
    as_json: JsonOption = False,
) -> None:
    """The verb `watch`.

    Only reads. Ends with the run: exit code 0 when it finished or was stopped, 3 when it failed or is gone. With --json
    prints what is now, once.
    """
    from amfm.pretrain.monitor.follow import FollowedRun

    if prometheus is not None and as_json:
        raise ValueError("--prometheus serves until it is interrupted, and --json prints once; give one of them")
    run = FollowedRun(run_dir)
    if prometheus is not None:
        serve_metrics(run, prometheus)
    elif as_json:
        print_json(run.to_json(run.final()) | {"health": judge_whole(run_dir)})
    else:
        try:
            show_live(run, stays=stay)
        except KeyboardInterrupt:
            say(f"amfm: no longer watching {run_dir}; the run is not touched")
            raise typer.Exit(INTERRUPTED) from None
    raise typer.Exit(RUN_FAILED if run.state in ("failed", "lost") else DONE)


def judge_whole(run_dir: Path) -> dict[str, Any] | None:
    """The verdict on a run as JSON values; None before its first step."""
    from amfm.pretrain.monitor.health import judge
    from amfm.pretrain.report.data import read_json_lines

    metrics, events = (
        read_json_lines(path)[0] if path.is_file() else []
        for path in (run_dir / "metrics.jsonl", run_dir / "events.jsonl")
    )
    steps = [line for line in metrics if isinstance(line.get("step"), int)]
    return judge(steps, events).to_json() if steps else None


def serve_metrics(run: FollowedRun, address: str) -> None:
    """Serve a run's numbers until Ctrl-C. Raises ValueError for what is not an address, RuntimeError for one that can't
    be had.
    """
    from amfm.launch.prometheus import make_server

    host, _, port = address.rpartition(":")
    if not port.isdecimal() or not 0 <= int(port) < 2**16:
        raise ValueError(f"--prometheus {address} must be PORT or HOST:PORT with a number below 65536; use 9464")
    try:
        server = make_server(run, host or "127.0.0.1", int(port))
    except OSError as error:
        raise RuntimeError(f"--prometheus {address}: {error.strerror}; name another port") from error
    with server:
        say(
            f"amfm: {run.directory} at http://{server.server_address[0]!s}:{server.server_address[1]}/metrics; Ctrl-C ends"
        )
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say(f"amfm: no longer watching {run.directory}; the run is not touched")
            raise typer.Exit(INTERRUPTED) from None


def show_live(run: FollowedRun, *, stays: bool) -> None:
    """Show a run until it ends: a panel on a terminal, lines anywhere else, remarks about events in both."""
    from rich.console import Console

    from amfm.pretrain.monitor.follow import follow
    from amfm.pretrain.monitor.live import LivePanel

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    live = LivePanel(console, run.panel.draw) if console.is_terminal else None
    printer = live or console
    said = ""
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
            is_first = False
    finally:
        if live is not None:
            live.close()


def add_verbs(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    app.command(epilog="Example: amfm watch runs/tiny_cpu")(watch)
