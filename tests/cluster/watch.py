"""What a fault costs, seen from outside of a run: who was named, after how long, and how long no step came.

A thread reads the run's files and the launcher's log while a test injects a fault, as an operator would; what it found becomes a row of the
table that `make test-cluster` ends with.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.cluster.cluster import PATH, events, metrics

POLL_SECONDS = 0.25
# What launcher, ranks or Slurm say of a fault; a run that nothing disturbs says none of it.
TELLING = re.compile(
    r"no progress for|lost|not seen any more|failed at checkpoint|is excluded|does not answer|queued again|remaining job time is too short|"
    r"restarted|srun: error|Node failure|Connection closed|ended by|Traceback|cannot be read|other rank"
)
HEAD = (
    "engine",
    "version",
    "fault",
    "named",
    "noticed, s",
    "no step for, s",
    "steps again",
    "ranks",
    "losses differ by",
)
LONGEST_CAUSE = 110


@dataclass
class Row:
    """A line of the table.

    `seconds_to_notice`: None if there was nothing to notice. `ranks`: of each start. `difference`: None if losses are
    not compared.
    """

    engine: str
    fault: str
    named: str = ""
    seconds_to_notice: float | None = None
    seconds_without_step: float = 0.0
    steps_again: int = 0
    ranks: tuple[int, ...] = ()
    difference: float | None = None

    def cells(self) -> list[str]:
        """Its cells as text, in the order of HEAD."""
        noticed = "-" if self.seconds_to_notice is None else f"{self.seconds_to_notice:.0f}"
        differ = "-" if self.difference is None else f"{self.difference:.0e}" if self.difference else "0"
        numbers = [noticed, f"{self.seconds_without_step:.0f}", str(self.steps_again), ", ".join(map(str, self.ranks))]
        return [self.engine, version_of(self.engine), self.fault, self.named or "no one", *numbers, differ]


class Watch:
    """Watches a run from the moment at which a fault is injected; `with` ends it."""

    def __init__(self, row: Row, run_dir: Path, log: Path) -> None:
        self.row, self.run_dir, self.log = row, run_dir, log
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_always, daemon=True)

    def __enter__(self) -> Watch:
        self._began = self._last_step_at = time.monotonic()
        self._lines = len(self._read_metrics())
        self._steps = self._last_step()
        self._starts = len(events(self.run_dir, "start"))
        self._offset = self.log.stat().st_size if self.log.exists() else 0
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._look()
        starts, causes = events(self.run_dir, "start"), events(self.run_dir, "restarted")
        left = read_json(self.run_dir / "launch/excluded_nodes.json").get("excluded", {})
        self.row.ranks = tuple(event["world_size"] for event in starts)
        named = causes[-1].get("cause") if causes else "; ".join(f"{name}: {reason}" for name, reason in left.items())
        self.row.named = self.row.named or shorten(str(named or ""))

    def _look_always(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            self._look()

    def _look(self) -> None:
        """Compare what is there with what was there at the look before."""
        now = time.monotonic()
        starts = events(self.run_dir, "start")
        for start in starts[self._starts :]:
            self.row.steps_again += max(0, self._steps - start["step"])
        self._starts = len(starts)
        lines = len(self._read_metrics())
        if lines > self._lines:
            self.row.seconds_without_step = max(self.row.seconds_without_step, now - self._last_step_at)
            self._last_step_at, self._steps = now, self._last_step()
        self._lines = lines  # fewer where a start cut off the steps that it does again
        if self.row.seconds_to_notice is None and self.log.exists():
            with self.log.open("rb") as file:
                file.seek(self._offset)
                said = file.read().decode(errors="replace")
            if TELLING.search(said):
                self.row.seconds_to_notice = now - self._began

    def _read_metrics(self) -> list[bytes]:
        path = self.run_dir / "metrics.jsonl"
        return path.read_bytes().splitlines() if path.exists() else []

    def _last_step(self) -> int:
        lines = metrics(self.run_dir)
        return int(lines[-1]["step"]) if lines else 0


def version_of(engine: str) -> str:
    """Version of the engine of a row."""
    if engine in ("Ray", "torchrun per node"):
        return version("ray" if engine == "Ray" else "torch")
    command = ("ssh", "-V") if engine == "ssh" else ("slurmctld", "-V")
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
        env=os.environ | {"PATH": PATH},
    )
    return done.stdout.replace("OpenSSH_", "OpenSSH ").replace(",", " ").split()[1]


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON file, empty where it is not there."""
    return dict(json.loads(path.read_text())) if path.exists() else {}


def shorten(text: str) -> str:
    """The beginning of a text as a cell of a table."""
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= LONGEST_CAUSE else f"{text[:LONGEST_CAUSE].rsplit(' ', 1)[0]} ..."


def to_dict(row: Row) -> dict[str, Any]:
    """A row as pytest takes it from one process to another."""
    return asdict(row) | {"ranks": list(row.ranks)}


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of all tests as a table in Markdown."""
    cells = [HEAD, ["---"] * len(HEAD), *(Row(**row).cells() for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)
