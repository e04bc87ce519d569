"""A preparation that pauses, and the bare tokenizer in its pauses: shares that a drift of the machine does not change.

The units of a store are written in slices by the same actors. Between two slices the actors wait, while as many plain
processes encode text of the slice that was just written, from memory. An actor's time in a slice ends when it has nothing
to do, which its name in /proc tells, so that a last unit on which others wait costs the preparation nothing.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.prepare.plan import Unit
from amfm.data_pipeline.prepare.prepare import prepare
from amfm.data_pipeline.prepare.ray_actors import run_on_ray
from amfm.data_pipeline.prepare.unit import UnitFailure, UnitReport
from amfm.data_pipeline.tokenizer.tokenizer import Tokenizer
from amfm.launch.cluster.child import Child
from benchmarks import ROOT
from benchmarks.data.prepare import CALLS
from benchmarks.preparation.alone import to_json
from benchmarks.preparation.processes import ACTOR, AT_WORK, MemoryWatch, below, memory_by_tenth, title

SETTLE_SECONDS, POLL_SECONDS = 0.2, 0.02
ALONE_BYTES = 20_000_000  # of text in each bare process and slice


@dataclass
class _Slice:
    """Figures of one slice. actor_seconds: by the clock, on average over the actors. `alone`: of each bare process."""

    text_bytes: int = 0
    units: int = 0
    cpu_seconds: float = 0.0
    actor_seconds: float = 0.0
    alone: list[dict[str, dict[str, float]]] = field(default_factory=list)

    def add(self, report: UnitReport) -> None:
        """Count a unit that was begun in this slice."""
        self.text_bytes += report.text_bytes
        self.cpu_seconds += report.cpu_seconds
        self.units += 1

    def row(self, actors: int) -> dict[str, float]:
        """Bytes per second and per CPU second, of preparation and of the bare tokenizer, and their ratios."""
        row = {
            "units": self.units,
            "text_bytes": self.text_bytes,
            "bytes_per_second": self.text_bytes / self.actor_seconds,
            "bytes_per_cpu_second": self.text_bytes / self.cpu_seconds,
        }
        for call in CALLS:
            figures = [found[call] for found in self.alone]
            rate = sum(found["bytes"] / found["seconds"] for found in figures)
            work = sum(found["bytes"] for found in figures) / sum(found["cpu_seconds"] for found in figures)
            row |= {
                f"{call}_bytes_per_second": rate,
                f"{call}_bytes_per_cpu_second": work,
                f"share_of_{call}": row["bytes_per_second"] / rate * actors / len(figures),
                f"cpu_share_of_{call}": row["bytes_per_cpu_second"] / work,
            }
        return row


class Turns:
    """A runner for `prepare` that writes units in slices and lets tokenizers work in between."""

    def __init__(self, num_slices: int, actors: int, work: Path, report: Callable[[str], None]) -> None:
        self.num_slices, self.actors, self.work, self.report = num_slices, actors, work, report
        self.slices: list[_Slice] = []
        self.idle_seconds = 0.0  # in which the actors had nothing to do, on average over them

    def run(
        self, units: Sequence[Unit], store: Path, tokenizer: Tokenizer, config: DataConfig
    ) -> Iterator[tuple[Unit, UnitReport | UnitFailure]]:
        """Write the units, slice after slice, and yield their reports as they come."""
        model = self.work / "tokenizer.model"
        model.write_bytes(tokenizer.to_bytes())
        per_slice = max(1, len(units) // self.num_slices - self.actors)  # and what the actors have begun by then
        with ExitStack() as stack:
            alone = [
                stack.enter_context(Child("benchmarks.preparation.alone", str(model), root=ROOT))
                for _ in range(self.actors)
            ]
            for child in alone:
                child.receive()
            begun_before = 0  # units that the actors had begun when the last slice ended
            current, mine, began = _Slice(), [], 0.0
            for unit, report in run_on_ray(units, store, tokenizer, config):
                yield unit, report
                assert isinstance(report, UnitReport), f"{report}: the disk failed"
                began = began or time.monotonic() - report.seconds  # the first: the start of Ray comes before it
                if begun_before:
                    self.slices[-1].add(report)
                    begun_before -= 1
                    continue
                current.add(report)
                mine.append(unit)
                if len(mine) == per_slice:
                    begun_before = self._pause(current, began, mine, alone)
                    current, mine, began = _Slice(), [], time.monotonic()

    def _pause(self, current: _Slice, began: float, units: Sequence[Unit], alone: Sequence[Child]) -> int:
        """Wait until no actor works, let the tokenizers encode text of the same units; how many units ended meanwhile."""
        ended = _ends_of_work()
        current.actor_seconds = statistics.mean(ended) - began
        for number, child in enumerate(alone):
            segments = [segment for unit in units[number :: len(alone)] for segment in unit.segments]
            child.start(json.dumps({"segments": to_json(segments), "max_bytes": ALONE_BYTES}))
        for child in alone:
            child.receive()
        for child in alone:
            child.start()
        current.alone = [child.receive() for child in alone]
        self.slices.append(current)
        self.idle_seconds += time.monotonic() - statistics.mean(ended)
        self.report(f"slice {len(self.slices)} of {self.num_slices}: {len(units)} units")
        return len(ended)


def _ends_of_work() -> list[float]:
    """Wait until every actor below this process has nothing to do; when each of them came to that."""
    time.sleep(SETTLE_SECONDS)  # a unit that was just handed out begins
    ends = {pid: 0.0 for pid in below(os.getpid()) if title(pid).startswith(ACTOR)}
    while not all(ends.values()):
        for pid, end in ends.items():
            if not end and not title(pid).startswith(AT_WORK):
                ends[pid] = time.monotonic()
        time.sleep(POLL_SECONDS)
    return list(ends.values())


def prepare_in_turns(
    config: DataConfig, num_slices: int, actors: int, work: Path, report: Callable[[str], None]
) -> dict[str, Any]:
    """Prepare a store in this process with pauses for the bare tokenizer.

    Returns identity, text_bytes, tokens, units, seconds (without pauses), slices, the shares as medians with least and most,
    `whole_share_of_...`: of all bytes over all seconds from the call to its end, and memory by tenths of the run.
    """
    turns = Turns(num_slices, actors, work, report)
    with MemoryWatch(os.getpid()).watching() as watch:
        made = prepare(config, runner=turns.run)
    rows = [found.row(actors) for found in turns.slices]
    seconds = made.seconds - turns.idle_seconds
    result: dict[str, Any] = {
        "identity": made.identity,
        "text_bytes": made.text_bytes,
        "tokens": sum(number for splits in made.tokens.values() for number in splits.values()),
        "units": made.units_total,
        "seconds": seconds,
        "bytes_per_second": made.text_bytes / seconds,
    }
    for call in CALLS:
        for share in (f"share_of_{call}", f"cpu_share_of_{call}"):
            values = [row[share] for row in rows]
            result |= {share: statistics.median(values), f"{share}_min": min(values), f"{share}_max": max(values)}
        rate = statistics.mean(row[f"{call}_bytes_per_second"] for row in rows)
        result[f"whole_share_of_{call}"] = result["bytes_per_second"] / rate
    return {**result, "slices": rows, "memory": memory_by_tenth(watch.samples)}
