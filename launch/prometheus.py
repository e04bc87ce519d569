"""A run's numbers for Prometheus, read from its directory at each scrape: `amfm watch RUN --prometheus PORT`.

The standard library's server and the text format, which is a line per number: nothing that a client library would add is needed.
Gauges carry the names of metrics.jsonl; the state of the run is a gauge per state, 1 for the one that holds.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from http import HTTPStatus
from typing import get_args

from amfm.launch.http_server import HttpHandler, HttpServer
from amfm.pretrain.monitor.follow import FollowedRun, State
from amfm.pretrain.monitor.metrics import flatten_numbers

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def format_metrics(run: FollowedRun) -> str:
    """Look at the run, and write what there is: the newest step's numbers, state, checkpoint, and ranks that give signs of life."""
    seen = run.look()
    metrics = run.panel.metrics or {}
    numbers = flatten_numbers(metrics)
    own = {"step": metrics.get("step"), "checkpoint_step": run.panel.checkpoint_step}
    own |= {"last_step": run.panel.last_step or None, "validation_loss": run.panel.validation_loss}
    numbers |= {name: float(value) for name, value in own.items() if value is not None}
    numbers |= {"ranks": float(len(seen.beats)), "hosts": float(len({beat.host for beat in seen.beats}))}
    name = run.config.run.name if run.config is not None and run.config.run.name else run.directory.resolve().name
    states = (
        f'amfm_state{{run="{escape(name)}",state="{state}"}} {int(state == seen.state)}\n' for state in get_args(State)
    )
    return format_gauges(name, numbers) + "".join(states)


def format_gauges(run_name: str, numbers: Mapping[str, float]) -> str:
    """A line of the text format for each number of a run."""
    label = escape(run_name)
    return "".join(
        f'amfm_{re.sub("[^a-zA-Z0-9_]", "_", name)}{{run="{label}"}} {value!r}\n' for name, value in numbers.items()
    )


def escape(text: str) -> str:
    """A label's value as the text format wants it."""
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def make_server(run: FollowedRun, host: str, port: int) -> HttpServer:
    """A server that answers `/metrics`. Raises OSError where the address can't be had."""
    lock = threading.Lock()  # a look changes what the run remembers

    class Metrics(HttpHandler):
        def do_GET(self) -> None:
            self.server.has_come(self.connection)
            path = self.accept()
            if path in ("/metrics", "/"):
                with lock:
                    body = format_metrics(run).encode()
                self.send(HTTPStatus.OK, body, CONTENT_TYPE)
            elif path is not None:
                self.refuse(HTTPStatus.NOT_FOUND, "only /metrics is here")

    return HttpServer(host, port, Metrics)
