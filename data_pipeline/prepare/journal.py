"""The append-only record of finished units: what makes a second preparation do only what is missing."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from data_pipeline.prepare.plan import Unit
from data_pipeline.prepare.unit import UnitReport
from data_pipeline.store.manifest import SPLITS, Part
from data_pipeline.store.shards import DamagedError
from data_pipeline.store.store import check_part_files

JOURNAL = "journal.jsonl"


class Journal:
    """A line a finished unit, fsynced. A line that a crash cut short is dropped; of two lines the last counts."""

    def __init__(self, store: Path) -> None:
        self.path = store / JOURNAL
        self._reports: dict[str, tuple[str, UnitReport]] = {}
        content = self.path.read_bytes() if self.path.exists() else b""
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(complete))
        for line in complete.splitlines():
            record = json.loads(line)
            record["report"]["parts"] = {
                split: [Part.from_json(part) for part in record["report"]["parts"][split]] for split in SPLITS
            }
            self._reports[record["unit"]] = record["key"], UnitReport(**record["report"])

    def find(self, store: Path, unit: Unit) -> UnitReport | None:
        """Report of a unit that was finished with the same inputs and settings and whose files are all there."""
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
        line = json.dumps({"unit": unit.name, "key": key, "report": asdict(report)}) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self._reports[unit.name] = key, report
