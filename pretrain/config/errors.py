"""The one error of configurations: every problem of a file in one message, each with place, value, rule and fix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Origin:
    """Where a value was written: a line of a file, or an override of the command line (line 0)."""

    source: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration.

    `key` is dotted (`train.steps`, `data.sources.0.weight`; empty for the file as a whole), `rule` says what must
    hold and `remedy` what to write instead. `value` is absent (None) if no value is at fault.
    """

    key: str
    rule: str
    remedy: str
    value: str | None = None
    origin: Origin | None = None

    def __str__(self) -> str:
        place = f"{self.origin}: " if self.origin else ""
        if not self.remedy:
            return f"{place}{self.rule}"
        subject = f"{self.key} = {self.value}" if self.key and self.value is not None else self.key or self.value or ""
        # An override already shows its key and value as the place.
        if self.origin and self.origin.source.startswith(f"override {self.key}="):
            subject = ""
        return f"{place}{subject + ': ' if subject else ''}{self.rule}; {self.remedy}"


class ConfigError(ValueError):
    """A configuration that cannot run; `problems` holds all that was found, the text lists them."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        assert problems, "a ConfigError needs at least one problem"
        self.problems = tuple(problems)
        lines = [str(problem) for problem in self.problems]
        super().__init__(
            lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems in the configuration:", *lines])
        )

    def located(self, origins: dict[str, Origin]) -> ConfigError:
        """Copy the error with the file and line of each key that `origins` knows, or of its nearest parent."""
        return ConfigError([replace(p, origin=p.origin or origin_of(p.key, origins)) for p in self.problems])


def origin_of(key: str, origins: dict[str, Origin]) -> Origin | None:
    """Find the place of `key` or, if it was not written, of the nearest section around it; None if that is unknown."""
    parts = key.split(".") if key else []
    for length in range(len(parts), -1, -1):
        found = origins.get(".".join(parts[:length]))
        if found is not None:
            return found
    return None
