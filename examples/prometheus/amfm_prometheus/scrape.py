"""A run's numbers for Prometheus, read from its directory at each scrape: `amfm watch RUN --prometheus PORT`; or for OpenTelemetry.

The standard library's server and the text format, which is a line per number: nothing that a client library would add is needed.
Gauges carry the names of metrics.jsonl; the state of the run is a gauge per state, 1 for the one that holds. What the launcher
does while no rank lives is a number too: its last sign of life, restarts, excluded nodes.
"""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import Any, get_args

from amfm_serve.http_server import HttpHandler, HttpServer

from amfm.launch.cluster.node_check import file_of, read_excluded
from amfm.launch.console import say
from amfm.pretrain.monitor.follow import Seen, State
from amfm.pretrain.monitor.held import read_held
from amfm.pretrain.monitor.metrics import flatten_numbers
from amfm.pretrain.report.verdict import Verdicts

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Numbers of which a step has several, and the label that tells them apart: one panel then serves every model.
PARTS = {"expert_load": "block", "mtp_loss": "module", "validation_by_source": "source"}
POST_SECONDS = 15.0


def watch_metrics(verdicts: Verdicts, prometheus: str | None, otlp: str | None) -> None:
    """The part `metrics` of the verb watch: serve a run's numbers at an address, or post them to a collector."""
    if prometheus is not None:
        serve_metrics(verdicts, prometheus)
    elif otlp is not None:
        post_metrics(verdicts, otlp)


def serve_metrics(verdicts: Verdicts, address: str) -> None:
    """Serve a run's numbers until Ctrl-C. Raises ValueError for what is not an address, RuntimeError for one that cannot
    be had.
    """
    run = verdicts.run
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or not 0 <= int(port) < 2**16:
        raise ValueError(f"--prometheus {address} must be PORT or HOST:PORT with a number below 65536; use 9464")
    try:
        server = make_server(verdicts, host or "127.0.0.1", int(port))
    except OSError as error:
        raise RuntimeError(f"--prometheus {address}: {error.strerror}; name another port") from error
    with server:
        say(
            f"amfm: {run.directory} at http://{server.server_address[0]!s}:{server.server_address[1]}/metrics; Ctrl-C ends"
        )
        server.serve_forever()


def post_metrics(verdicts: Verdicts, address: str) -> None:
    """Post a run's numbers until it ends or Ctrl-C; a collector that does not answer is said once. Raises ValueError for no URL."""
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"--otlp {address} must be an http(s) URL, such as http://localhost:4318/v1/metrics")
    run, is_said = verdicts.run, False
    while True:
        content = json.dumps(describe_otlp(verdicts)).encode()
        request = urllib.request.Request(address, content, {"Content-Type": "application/json"})
        try:
            urllib.request.urlopen(request, timeout=POST_SECONDS).close()
        except (OSError, HTTPException) as error:
            if not is_said:
                say(f"amfm: warning: {address} does not accept metrics ({error}); trying on")
            is_said = True
        if run.state not in ("running", "waiting"):
            return
        time.sleep(POST_SECONDS)


def collect(verdicts: Verdicts) -> tuple[dict[str, str], dict[str, float], Seen]:
    """Look at the run: labels that name it, and what there is: the newest step's numbers, checkpoint, and ranks that give signs of life."""
    run = verdicts.run
    seen = run.poll()
    verdict = verdicts.of(seen)
    metrics = run.panel.metrics or {}
    numbers = flatten_numbers(metrics)
    own = {"step": metrics.get("step"), "checkpoint_step": run.panel.checkpoint_step}
    own |= {"last_step": run.panel.last_step or None, "validation_loss": run.panel.validation_loss}
    own |= {
        "restarts": max(0, run.starts - 1),
        "excluded_nodes": len(read_excluded(file_of(run.directory)).get("excluded") or ()),
    }
    own |= {"step_age_seconds": age(metrics.get("time")), "launcher_age_seconds": launcher_age(run.directory)}
    numbers |= {name: float(value) for name, value in own.items() if value is not None}
    numbers |= {"ranks": float(len(seen.beats)), "hosts": float(len({beat.host for beat in seen.beats}))}
    if verdict is not None:
        numbers["well"] = float(not verdict.findings)
    directory = run.directory.resolve()
    # Many runs are folders of the same name, such as `run`.
    name = run.config.run.name if run.config is not None and run.config.run.name else "/".join(directory.parts[-2:])
    return {"run": name, "dir": str(directory)}, numbers, seen


def format_metrics(verdicts: Verdicts) -> str:
    """Look at the run, and write its numbers, state and findings as Prometheus reads them."""
    place, numbers, seen = collect(verdicts)
    states = [
        f"amfm_state{format_labels(place | {'state': state})} {int(state == seen.state)}\n" for state in get_args(State)
    ]
    verdict = verdicts.of(seen)
    findings = Counter(finding.rule for finding in verdict.findings) if verdict else {}
    found = [f"amfm_finding{format_labels(place | {'rule': rule})} {number}\n" for rule, number in findings.items()]
    gauges = format_gauges(place["run"], numbers, dir=place["dir"])
    kinds = {"amfm_state": states, **({"amfm_finding": found} if found else {})}
    return gauges + "".join(f"# TYPE {kind} gauge\n{''.join(lines)}" for kind, lines in kinds.items())


def describe_otlp(verdicts: Verdicts) -> dict[str, Any]:
    """Look at the run, and write its numbers and state as a request of OTLP over HTTP in JSON (opentelemetry-proto 1.0).

    Gauges of the names that Prometheus gets; `amfm_state` is 1 with the attribute `state`.
    """
    place, numbers, seen = collect(verdicts)
    moment = str(time.time_ns())

    def attributes(labels: Mapping[str, str]) -> list[dict[str, Any]]:
        return [{"key": key, "value": {"stringValue": value}} for key, value in labels.items()]

    points: dict[str, list[dict[str, Any]]] = {}
    for number, value in numbers.items():
        name, parts = metric_name(number)
        point = {"timeUnixNano": moment, "asDouble": value, "attributes": attributes(parts)}
        points.setdefault(name, []).append(point)
    now = {"timeUnixNano": moment, "asDouble": 1.0, "attributes": attributes({"state": seen.state})}
    points["amfm_state"] = [now]
    gauges = [{"name": name, "gauge": {"dataPoints": of_name}} for name, of_name in points.items()]
    scope = {"scope": {"name": "amfm"}, "metrics": gauges}
    resource = {"attributes": attributes({"service.name": "amfm"} | place)}
    return {"resourceMetrics": [{"resource": resource, "scopeMetrics": [scope]}]}


def metric_name(name: str) -> tuple[str, dict[str, str]]:
    """A number's name for programs that allow letters, digits and underscores, and the label that says of which part it is."""
    kind, _, part = name.partition("/")
    labels = {PARTS[kind]: part} if kind in PARTS and part else {}
    return f"amfm_{re.sub('[^a-zA-Z0-9_]', '_', kind if labels else name)}", labels


def format_gauges(run_name: str, numbers: Mapping[str, float], **labels: str) -> str:
    """Lines of the text format for the numbers of a run: the type of each name, and its values with these labels."""
    lines: dict[str, list[str]] = {}
    for number, value in numbers.items():
        name, parts = metric_name(number)
        line = f"{name}{format_labels({'run': run_name} | labels | parts)} {value!r}\n"
        lines.setdefault(name, []).append(line)
    return "".join(
        f"# TYPE {name} {'counter' if name == 'amfm_restarts' else 'gauge'}\n{''.join(of_name)}"
        for name, of_name in lines.items()
    )


def format_labels(labels: Mapping[str, str]) -> str:
    """Labels as the text format has them."""
    return "{" + ",".join(f'{name}="{escape(value)}"' for name, value in labels.items()) + "}"


def age(moment: object) -> float | None:
    """Seconds since a moment in seconds since 1970; None where it is not known."""
    return max(0.0, time.time() - moment) if isinstance(moment, float) else None


def launcher_age(directory: Path) -> float | None:
    """Seconds since the last sign of the run's launcher: few while it lives, also when it waits for nodes or storage."""
    held = read_held(directory)
    return age(held[-1][1]) if held else None


def escape(text: str) -> str:
    """A label's value as the text format wants it."""
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def make_server(verdicts: Verdicts, host: str, port: int) -> HttpServer:
    """A server that answers `/metrics`. Raises OSError if the address cannot be had."""
    lock = threading.Lock()  # a look changes what the run remembers

    class Metrics(HttpHandler):
        def do_GET(self) -> None:
            self.server.has_come(self.connection)
            path = self.accept()
            if path in ("/metrics", "/"):
                with lock:
                    body = format_metrics(verdicts).encode()
                self.send(HTTPStatus.OK, body, CONTENT_TYPE)
            elif path is not None:
                self.refuse(HTTPStatus.NOT_FOUND, "only /metrics is here")

    return HttpServer(host, port, Metrics)
