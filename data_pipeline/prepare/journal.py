"""The append-only record of finished units: what makes a second preparation do only what is missing.

Parts on their own would not do: a part on the disk does not say whether its unit wrote all that it should, or from which inputs. A
line has the unit's key, a digest of everything that decides its output, so a changed file or setting finds no line and the
unit is written again. One process writes the journal, the one that holds the store's lock; actors only report.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from amfm.data_pipeline.durable.lines import LineFile, read_lines
from amfm.data_pipeline.prepare.plan import Unit
from amfm.data_pipeline.prepare.unit import UnitReport
from amfm.data_pipeline.store.manifest import SPLITS, Part
from amfm.data_pipeline.store.shards import DamagedError
from amfm.data_pipeline.store.store import check_part_files

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
