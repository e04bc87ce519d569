"""Preparation against the tokenizer alone: tokens a second with as many processes, and what Ray itself costs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.config import DataConfig
from data_pipeline.prepare import prepare
from data_pipeline.prepare_plan import Unit
from data_pipeline.prepare_ray import run_on_ray
from data_pipeline.prepare_unit import UnitFailure, UnitReport
from data_pipeline.tokenizer import Tokenizer
from launch.bench_data_files import BenchData

ALONE_CHARACTERS = 24_000_000  # four seconds of the fastest tokenizer
ACTOR = "ray::PartWriter"


@dataclass
class _Moment:
    """CPU seconds since the start at one moment: of this process and all below it, and of the actors' work alone."""

    when: float
    total: float
    actors: float


@dataclass
class _Watched:
    """Reports of a preparation, and the CPU seconds of its processes as they come in."""

    reports: list[UnitReport] = field(default_factory=list)
    moments: list[_Moment] = field(default_factory=list)

    def run(
        self, units: Sequence[Unit], store: Path, tokenizer: Tokenizer, config: DataConfig
    ) -> Iterator[tuple[Unit, UnitReport | UnitFailure]]:
        """Write the units on Ray, as `amfm prepare` does, and look at the processes after each."""
        for unit, report in run_on_ray(units, store, tokenizer, config):
            if isinstance(report, UnitReport):
                self.reports.append(report)
                self.moments.append(_look())
            yield unit, report


def measure_preparation(settings: BenchData, report: Callable[[str], None]) -> dict[str, Any]:
    """Prepare the store `fast` on Ray, between two measurements of the tokenizer alone in as many processes.

    tokens_per_second: from the first unit's beginning to the last one's end, all actors together. tokenizer_...: of
    one process while as many work as there are actors. efficiency: per CPU second, of the work inside the actors.
    ray_cpu_fraction: share of all CPU time that is not the actors' work, from the first report to the last; None where
    there is no /proc. ray_start_cpu_seconds: what starting and ending up to there cost, whatever the amount of text.
    """
    report(f"preparing: the tokenizer alone in {settings.actors} processes")
    alone = _tokenize_alone(settings)
    report(f"preparing: {settings.actors} Ray actors")
    shutil.rmtree(settings.work / "fast", ignore_errors=True)
    watched, before = _Watched(), _look()
    prepare(settings.data_config("fast"), runner=watched.run)
    report(f"preparing: the tokenizer alone in {settings.actors} processes, again")
    alone += _tokenize_alone(settings)
    return _summary(settings, watched, before, alone)


def _summary(settings: BenchData, watched: _Watched, before: _Moment, alone: list[dict[str, float]]) -> dict[str, Any]:
    reports, moments = watched.reports, watched.moments
    began = min(moment.when - report.seconds for moment, report in zip(moments, reports))
    tokens = sum(report.tokens for report in reports)
    work = sum(report.cpu_seconds for report in reports)
    per_second = tokens / (moments[-1].when - began)
    one_process = sum(entry["tokens"] / entry["seconds"] for entry in alone) / len(alone)
    per_cpu_second = sum(entry["tokens"] for entry in alone) / sum(entry["cpu_seconds"] for entry in alone)
    total = moments[-1].total - moments[0].total
    actors = moments[-1].actors - moments[0].actors
    return {
        "tokens": tokens,
        "text_bytes": sum(report.text_bytes for report in reports),
        "parts": len(reports),
        "actors": settings.actors,
        "tokens_per_second": per_second,
        "tokenizer_tokens_per_second": one_process,
        "share_of_tokenizer": per_second / (one_process * settings.actors),
        "tokens_per_cpu_second": tokens / work,
        "tokenizer_tokens_per_cpu_second": per_cpu_second,
        "efficiency": tokens / work / per_cpu_second,
        "ray_cpu_fraction": 1 - actors / total if total else None,
        "ray_start_cpu_seconds": moments[-1].total - before.total - work - (total - actors),
    }


def _tokenize_alone(settings: BenchData) -> list[dict[str, float]]:
    """Tokens, seconds and CPU seconds of each of `actors` processes that tokenize at the same time, without Ray."""
    config = settings.data_config("fast")
    arguments = json.dumps({"data": config.model_dump(mode="json"), "characters": ALONE_CHARACTERS})
    command = [sys.executable, "-m", "launch.bench_data_child", "tokenize", arguments]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(settings.actors)
    ]
    try:
        for process in processes:
            assert process.stdout is not None, "the pipe was asked for"
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("the process that tokenizes alone ended early; its message is above")
        for process in processes:
            assert process.stdin is not None, "the pipe was asked for"
            process.stdin.write("go\n")
            process.stdin.flush()
        return [json.loads(process.communicate()[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _look() -> _Moment:
    """CPU seconds of this process, of everything below it, and of the actors among them without Ray's threads.

    An actor works on its main thread and on short-lived ones of the tokenizer; the others that live are Ray's.
    """
    here = os.times()
    moment = _Moment(time.monotonic(), here.user + here.system, 0.0)
    below, parents = {os.getpid()}, _processes()
    while True:
        found = {pid for pid, parent in parents.items() if parent in below and pid not in below}
        if not found:
            return moment
        below |= found
        for pid in found:
            name, seconds = _cpu_seconds(Path(f"/proc/{pid}"))
            moment.total += seconds
            if name.startswith(ACTOR):
                others = [task for task in Path(f"/proc/{pid}/task").glob("[0-9]*") if task.name != str(pid)]
                moment.actors += seconds - sum(_cpu_seconds(task)[1] for task in others)


def _processes() -> dict[int, int]:
    """Parent of every process; nothing where there is no /proc."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        fields = _stat_fields(path.parent)
        if fields:
            found[int(path.parent.name)] = int(fields[2])
    return found


def _cpu_seconds(folder: Path) -> tuple[str, float]:
    """Name and CPU seconds of a process or thread that may have ended."""
    fields = _stat_fields(folder)
    if not fields:
        return "", 0.0
    return fields[0], (int(fields[12]) + int(fields[13])) / os.sysconf("SC_CLK_TCK")


def _stat_fields(folder: Path) -> list[str]:
    """Name, state, parent and what follows in a stat file of /proc; empty when the process has ended."""
    try:
        text = (folder / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    name, _, rest = text.partition("(")[2].rpartition(")")
    return [name, *rest.split()]
