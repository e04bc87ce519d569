"""Nodes that a run does without: who failed a check, and who was lost several times, by name and with the reason.

Remembered in the run directory, so that the next launch of the run leaves them out too. Only the launcher writes there.
"""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from pathlib import Path

from amfm.data_pipeline.durable.files import write_file_atomically
from amfm.launch.console import say

MAX_LOSSES = 2  # the first one may be anyone's


class LeftOut:
    """`reasons`: why, by name of the node; `losses`: how often a node was lost while it had ranks."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "launch" / "left_out.json"
        self.reasons: dict[str, str] = {}
        self.losses: Counter[str] = Counter()
        with suppress(FileNotFoundError):
            try:
                known = json.loads(self.path.read_text(encoding="utf-8"))
                self.reasons |= {str(name): str(reason) for name, reason in known["left_out"].items()}
                self.losses.update({str(name): int(count) for name, count in known["losses"].items()})
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{self.path} is not what amfm wrote ({error!r}); delete it") from error
        for name, reason in self.reasons.items():
            say(
                f"amfm launch: {name} is left out, as before: {reason} ({self.path} remembers it; delete it to try again)"
            )

    def leave_out(self, name: str, reason: str) -> None:
        """Do without a node from now on."""
        say(f"amfm launch: {name} is left out: {reason}")
        self.reasons[name] = reason
        self._write()

    def lose(self, name: str) -> None:
        """Count a node that was lost while it had ranks; who is lost MAX_LOSSES times is left out."""
        self.losses[name] += 1
        if self.losses[name] >= MAX_LOSSES and name not in self.reasons:
            self.leave_out(name, f"it was lost {self.losses[name]} times")
        self._write()

    def _write(self) -> None:
        text = json.dumps({"left_out": self.reasons, "losses": dict(self.losses)}, indent=1) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_file_atomically(self.path, text.encode())
        except OSError as error:  # this launcher knows it anyway
            say(f"amfm launch: {self.path}: {error.strerror}; the next launch tries these nodes again")
