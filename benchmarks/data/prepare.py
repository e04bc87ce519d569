"""Preparation benchmark: `amfm prepare` on Ray against only the tokenizer, in turns, and what Ray itself costs.

How it works: a round prepares the whole text with `actors` actors and lets as many plain processes tokenize the same
text from memory; their order alternates, and ratios are formed within a round, so that a drift of the machine cancels.
CPU seconds come from /proc for this process and everything below it, which tells Ray's own work from that of the
actors.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.prepare.plan import Unit
from amfm.data_pipeline.prepare.prepare import prepare
from amfm.data_pipeline.prepare.ray_actors import run_on_ray, running_ray
from amfm.data_pipeline.prepare.unit import UnitFailure, UnitReport
from amfm.data_pipeline.tokenizer.tokenizer import Tokenizer
from amfm.launch.cluster.child import Child
from benchmarks import ROOT
from benchmarks.data.files import BenchData

ACTOR = "ray::PartWriter"
CALM_SECONDS = 30.0

# Calls of SentencePiece: ids as Python's lists, its default, which most pipelines use, and as arrays, its fastest.
CALLS: dict[str, type[int] | Literal["numpy"]] = {"tokenizer": int, "fastest": "numpy"}

_Alone = dict[str, dict[str, float]]  # tokens, seconds and cpu_seconds by the names of CALLS


@dataclass
class _Moment:
    """CPU seconds since the start at one moment: of this process and all below it, and of only the actors' work."""

    when: float
    total: float
    actors: float


@dataclass
class _Watched:
    """Reports of a preparation with the time at which they came, and CPU seconds.

    `moments`: when Ray had started, at the first report and at the last.
    """

    reports: list[tuple[float, UnitReport]] = field(default_factory=list)
    moments: list[_Moment] = field(default_factory=list)

    def run(
        self, units: Sequence[Unit], store: Path, tokenizer: Tokenizer, config: DataConfig
    ) -> Iterator[tuple[Unit, UnitReport | UnitFailure]]:
        """Write the units on Ray, as `amfm prepare` does, once Ray's own processes have started."""
        with running_ray(None, min(len(units), config.prepare.num_actors or len(units))):
            _wait_until_calm()
            self.moments.append(_measure())
            for unit, report in run_on_ray(units, store, tokenizer, config):
                if isinstance(report, UnitReport):
                    self.reports.append((time.monotonic(), report))
                    if len(self.reports) in (1, len(units)):
                        self.moments.append(_measure())
                yield unit, report


def measure_preparation(settings: BenchData, report: Callable[[str], None]) -> dict[str, Any]:
    """Prepare the store `fast` on Ray and tokenize the same text in as many processes without it, in turns.

    Medians of the rounds, ratios formed inside each. tokens_per_second: from the first unit's beginning to the last
    one's end, all actors together. tokenizer_...: of one process in which SentencePiece encodes whole texts from memory
    by its default call, while as many work as there are actors; fastest_...: by its fastest. share_of_...:
    tokens_per_second over the one or the other by the clock, times actors. efficiency: over the fastest per CPU second,
    of the work inside the actors. ray_cpu_fraction: share of all CPU time that is not the actors' work, from the
    first report to the last; None if there is no /proc. ray_start_cpu_seconds: what Ray took to start, which is waited
    for, so that it counts as neither.
    """
    rounds: list[dict[str, Any]] = []
    with _tokenizers_alone(settings) as tokenize_alone:
        for turn in range(1, settings.rounds + 1):
            report(f"preparing: round {turn} of {settings.rounds}")
            alone = tokenize_alone() if turn % 2 else []  # who comes first changes, so that a drift favours neither
            shutil.rmtree(settings.work / "fast", ignore_errors=True)
            watched, before = _Watched(), _measure()
            prepare(settings.data_config("fast"), runner=watched.run)
            rounds.append(_summary(settings, watched, before, alone or tokenize_alone()))
    shares = {call: [entry[f"share_of_{call}"] for entry in rounds] for call in CALLS}
    medians = {
        key: None if rounds[0][key] is None else statistics.median(entry[key] for entry in rounds) for key in rounds[0]
    }
    return {
        **medians,
        "actors": settings.actors,
        "rounds": len(rounds),
        **{f"share_of_{call}_min": min(values) for call, values in shares.items()},
        **{f"share_of_{call}_max": max(values) for call, values in shares.items()},
    }


def _summary(settings: BenchData, watched: _Watched, before: _Moment, alone: list[_Alone]) -> dict[str, Any]:
    """Figures of one round."""
    reports, (started, first, *later) = [report for _, report in watched.reports], watched.moments
    last = later[-1] if later else first
    began = min(when - report.seconds for when, report in watched.reports)
    tokens = sum(report.tokens for report in reports)
    work = sum(report.cpu_seconds for report in reports)
    per_second = tokens / (watched.reports[-1][0] - began)
    one_process = {
        call: statistics.mean(entry[call]["tokens"] / entry[call]["seconds"] for entry in alone) for call in CALLS
    }
    fastest = [entry["fastest"] for entry in alone]
    per_cpu_second = sum(entry["tokens"] for entry in fastest) / sum(entry["cpu_seconds"] for entry in fastest)
    total, actors = last.total - first.total, last.actors - first.actors
    return {
        "tokens": tokens,
        "text_bytes": sum(report.text_bytes for report in reports),
        "parts": sum(len(parts) for report in reports for parts in report.parts.values()),
        "tokens_per_second": per_second,
        **{f"{call}_tokens_per_second": rate for call, rate in one_process.items()},
        **{f"share_of_{call}": per_second / (rate * settings.actors) for call, rate in one_process.items()},
        "tokens_per_cpu_second": tokens / work,
        "fastest_tokens_per_cpu_second": per_cpu_second,
        "efficiency": tokens / work / per_cpu_second,
        "ray_cpu_fraction": 1 - actors / total if total else None,
        "ray_start_cpu_seconds": started.total - before.total,
    }


def _wait_until_calm() -> None:
    """Wait until this process and all below it use at most a tenth of a core, but no longer than CALM_SECONDS.

    Ray's agents import for seconds after Ray answers, which would count as work of the first units.
    """
    deadline, before = time.monotonic() + CALM_SECONDS, _measure()
    while time.monotonic() < deadline:
        time.sleep(1)
        now = _measure()
        if now.total - before.total <= 0.1 * (now.when - before.when):
            return
        before = now


@contextmanager
def _tokenizers_alone(settings: BenchData) -> Iterator[Callable[[], list[_Alone]]]:
    """A function that lets `actors` processes without Ray tokenize at the same time, each its share of the text.

    It returns the tokens, seconds and CPU seconds of each, by the names of CALLS.
    """
    config = settings.data_config("fast").model_dump(mode="json")
    shares = [{"data": config, "share": share, "shares": settings.actors} for share in range(settings.actors)]
    with ExitStack() as stack:
        children = [
            stack.enter_context(Child("benchmarks.data.child", "tokenize", json.dumps(share), root=ROOT))
            for share in shares
        ]
        for child in children:
            child.receive()  # its text is in memory

        def tokenize_alone() -> list[_Alone]:
            for child in children:
                child.start()
            return [child.receive() for child in children]

        yield tokenize_alone


def _measure() -> _Moment:
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
    """Parent of every process by its number; empty if there is no /proc."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        fields = _stat_fields(path.parent)
        if fields:
            found[int(path.parent.name)] = int(fields[2])
    return found


def _cpu_seconds(folder: Path) -> tuple[str, float]:
    """Name and CPU seconds of a process or thread; empty and 0 if it has ended."""
    fields = _stat_fields(folder)
    if not fields:
        return "", 0.0
    return fields[0], (int(fields[12]) + int(fields[13])) / os.sysconf("SC_CLK_TCK")


def _stat_fields(folder: Path) -> list[str]:
    """Fields of a stat file of /proc: name, state, parent and the rest; empty when the process has ended."""
    try:
        text = (folder / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    name, _, rest = text.partition("(")[2].rpartition(")")
    return [name, *rest.split()]
