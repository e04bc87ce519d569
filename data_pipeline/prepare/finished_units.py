"""Finished units of a preparation: the append-only journal that records them, and how many `max_tokens` of a source needs.

The journal is what makes a second preparation do only what is missing. Parts on their own would not do: a part on the disk does not say whether its unit wrote all that it should, or from which inputs. A
line has the unit's key, a digest of everything that decides its output, so a changed file or setting finds no line and the
unit is written again. One process writes the journal, the one that holds the store's lock; actors only report.

`max_tokens` needs the shortest run of a source's units, in the order of the plan, that has this many tokens.
How many tokens a text has is known when it is tokenized. So units are written a few at a time: first half of what four
bytes per token would need, then as many as the rate so far says are missing. Which units stay depends only on their tokens
and not on these guesses, so the store is the same whatever number of actors wrote it and however often it was
stopped.

Who writes units: this process where the text is small, else Ray actors. The bytes are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.durable.json_files import LineFile, read_lines
from amfm.data_pipeline.prepare.plan import BYTES_A_TOKEN, Unit
from amfm.data_pipeline.prepare.ray_actors import run_on_ray
from amfm.data_pipeline.prepare.unit import UnitFailure, UnitReport, run_unit
from amfm.data_pipeline.store.manifest import SPLITS, Part
from amfm.data_pipeline.store.part_writer import import_zarr
from amfm.data_pipeline.store.shards import DamagedError
from amfm.data_pipeline.store.store import check_part_files
from amfm.data_pipeline.terminal import Report, silent
from amfm.data_pipeline.tokenizer.tokenizer import Tokenizer

JOURNAL = "journal.jsonl"


class Journal:
    """A line a finished unit, fsynced, with its own digest; of two lines of a unit the last counts.

    A line that a crash truncated or that changed since it was written counts as none: its unit is written again.
    """

    def __init__(self, store: Path) -> None:
        self.path = store / JOURNAL
        self._reports: dict[str, tuple[str, UnitReport]] = {}
        for _, record in read_lines(self.path) if self.path.exists() else ():
            if record is not None and record.pop("digest", None) == _digest(record):
                self._remember(record)

    def _remember(self, record: dict[str, Any]) -> None:
        """Keep the report of a line under its unit, in place of an earlier one."""
        report = record["report"]
        parts = {split: [Part.from_json(part) for part in report["parts"][split]] for split in SPLITS}
        self._reports[record["unit"]] = record["key"], UnitReport(**{**report, "parts": parts})

    def source_names(self) -> set[str]:
        """Sources of which units were ever finished."""
        return {name.rpartition("/")[0] for name in self._reports}

    def find(self, store: Path, unit: Unit) -> UnitReport | None:
        """Find the report of a unit that was finished with the same inputs and settings and whose files are all there."""
        key, report = self._reports.get(unit.name, ("", None))
        if report is None or key != unit.key():
            return None
        try:
            for split in SPLITS:
                for part in report.parts[split]:
                    check_part_files(store, part)
        except DamagedError:
            return None
        return report

    def append(self, unit: Unit, report: UnitReport) -> None:
        """Record a finished unit; durable when this returns."""
        key = unit.key()
        record: dict[str, Any] = {"unit": unit.name, "key": key, "report": asdict(report)}
        file = LineFile(self.path)
        file.write({**record, "digest": _digest(record)})
        file.sync()
        file.close()
        self._reports[unit.name] = key, report


def _digest(record: dict[str, Any]) -> str:
    """Digest of a line; NaN and infinity, which no report holds, would differ from themselves."""
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()


SMALL_BYTES = 50_000_000  # of text: one process has written it by the time that Ray and its actors have started


def run_units(
    units: Sequence[Unit],
    store: Path,
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    address: str | None = None,
    report: Report = silent,
) -> Iterator[tuple[Unit, UnitReport | UnitFailure]]:
    """Write units and yield each report as it comes; errors of a unit are raised.

    In this process where the units have less than SMALL_BYTES of text, no cluster is named by `address` and
    `data.prepare.num_actors` does not ask for several.
    """
    text_bytes = sum(unit.text_bytes for unit in units)
    if address is not None or (config.prepare.num_actors or 1) > 1 or text_bytes >= SMALL_BYTES:
        yield from run_on_ray(units, store, tokenizer, config, address=address, report=report)
        return
    import_zarr()
    for unit in units:
        yield unit, run_unit(unit, store, tokenizer)


FIRST_SHARE = 0.5  # of the first guess, so that a language of few tokens per byte wastes no work


def take_tokens(
    units: Sequence[Unit],
    max_tokens: int,
    find: Callable[[Unit], UnitReport | None],
    write: Callable[[Sequence[Unit]], None],
) -> list[Unit]:
    """Choose the shortest prefix of `units` with `max_tokens` tokens, or all of them if there are fewer; writes what is missing.

    find: the report of a unit that is done. write: does units, and raises where it cannot.
    """
    asked = 0
    while True:
        reports = [report for unit in units[:asked] if (report := find(unit)) is not None]
        assert len(reports) == asked, "every unit that was asked for is written"
        totals = list(accumulate(report.tokens for report in reports))
        enough = next((number for number, total in enumerate(totals, 1) if total >= max_tokens), None)
        if enough is not None or asked == len(units):
            return list(units[:enough])
        done = totals[-1] if totals else 0
        if done:
            wanted = (max_tokens - done) * sum(unit.text_bytes for unit in units[:asked]) / done
        else:
            wanted = max_tokens * BYTES_A_TOKEN * FIRST_SHARE
        more = accumulate(unit.text_bytes for unit in units[asked:])
        stop = next((number for number, total in enumerate(more, 1) if total >= wanted), len(units) - asked)
        write([unit for unit in units[asked : asked + stop] if find(unit) is None])
        asked += stop
