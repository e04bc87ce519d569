"""Nodes that a run excludes: those that failed a check or were lost several times, by name and with the reason.

Kept in the run directory, so that the next launch of the run excludes them too. Only the launcher writes there.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from amfm.data_pipeline.durable.files import write_file_atomically
from amfm.data_pipeline.durable.foreign_files import read_object
from amfm.launch.console import say

FILE = Path("launch") / "excluded_nodes.json"
OLD_FILE, OLD_KEY = FILE.with_name("left_out.json"), "left_out"  # of launches before the file had its present name
MAX_LOSSES = 2  # the first one may be anyone's


class ExcludedNodes:
    """`reasons`: why, by name of the node; `losses`: how often a node was lost while it had ranks."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / FILE
        path = file_of(run_dir)
        try:
            known = read_excluded(path)
            self.reasons = {str(name): str(reason) for name, reason in known["excluded"].items()}
            self.losses = Counter({str(name): int(count) for name, count in known["losses"].items()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} is not what amfm wrote ({error!r}); delete it") from error
        for name, reason in self.reasons.items():
            say(f"amfm launch: {name} is excluded, as before: {reason} (listed in {path}; delete it to try again)")

    def exclude(self, name: str, reason: str) -> None:
        """Do without a node from now on."""
        say(f"amfm launch: {name} is excluded: {reason}")
        self.reasons[name] = reason
        self._write()

    def lose(self, name: str) -> None:
        """Count a node that was lost while it had ranks; one that is lost MAX_LOSSES times is excluded."""
        self.losses[name] += 1
        if self.losses[name] >= MAX_LOSSES and name not in self.reasons:
            self.exclude(name, f"it was lost {self.losses[name]} times")
        self._write()

    def _write(self) -> None:
        text = json.dumps({"excluded": self.reasons, "losses": dict(self.losses)}, indent=1) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_file_atomically(self.path, text.encode())
        except OSError as error:  # this launcher knows it anyway
            say(f"amfm launch: {self.path}: {error.strerror}; the next launch tries these nodes again")


def file_of(run_dir: Path) -> Path:
    """The file of a run's excluded nodes: the one of before if only that is there."""
    return run_dir / (OLD_FILE if (run_dir / OLD_FILE).is_file() and not (run_dir / FILE).is_file() else FILE)


def read_excluded(path: Path) -> dict[str, Any]:
    """What a file of `file_of` holds: `excluded` and `losses`, empty without a file. Raises ValueError if it is not JSON."""
    if not path.is_file():
        return {"excluded": {}, "losses": {}}
    known = read_object(path)
    return {("excluded" if key == OLD_KEY else key): value for key, value in known.items()}
