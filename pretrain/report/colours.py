"""The colours of a report: light and dark for the page, light for pictures, and stand-ins for what follows the page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Colours:
    """Colours of text next to plots (`ink`), of rules and grids (`line`), and of six series; #rrggbb each."""

    ink: str
    line: str
    series: tuple[str, str, str, str, str, str]

    def named(self) -> Iterator[tuple[str, str]]:
        """Yield the colours with the names that the page's style sheet gives them."""
        yield "muted", self.ink
        yield "line", self.line
        for number, colour in enumerate(self.series, start=1):
            yield f"series-{number}", colour

    def css(self) -> str:
        """Write the colours as variables of a style sheet."""
        return " ".join(f"--{name}: {colour};" for name, colour in self.named())


LIGHT = Colours("#5b6470", "#e3e6ea", ("#2f6fde", "#d4572a", "#7a4fd0", "#b8860b", "#12866d", "#c23d80"))
DARK = Colours("#9aa3ae", "#2a3038", ("#7aa7ff", "#ff9466", "#b79bff", "#e6c15a", "#56d0b3", "#ff8fc0"))

# matplotlib writes these, and the page's variables take their places, so that one SVG serves both themes.
THEMED = Colours("#010101", "#020202", ("#030301", "#030302", "#030303", "#030304", "#030305", "#030306"))
