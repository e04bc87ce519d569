"""Numbers in words: short ones for ticks and boxes, rounded ones for tables, durations."""

from __future__ import annotations

import math
from collections.abc import Sequence

MAX_LISTED = 8


def short(value: float, _position: int | None = None, *, digits: int = 3) -> str:
    """Format a number for tick labels in three digits and a unit prefix: 12345 -> 12.3k."""
    return _scaled(value, "k", "M", "G", "T", digits=digits)


def distinct(values: Sequence[float]) -> list[str]:
    """Format tick labels in as many digits, three at least, as make no two of them the same."""
    for digits in range(3, 7):
        labels = [short(value, digits=digits) for value in values]
        if len(set(labels)) == len(set(values)):
            break
    return labels


def count(value: float) -> str:
    """Format a number of parameters or tokens in three digits and a unit: 1234567 -> 1.23M."""
    return _scaled(value, "k", "M", "B", "T")


def _scaled(value: float, *letters: str, digits: int = 3) -> str:
    """Format in this many digits and the letter of the largest power of a thousand below the value."""
    for power in range(len(letters), 0, -1):
        if abs(value) >= 1000**power:
            return f"{value / 1000**power:.{digits}g}{letters[power - 1]}"
    return f"{value:.{digits}g}"


def perplexity(loss: float) -> str:
    """Format exp(loss); a loss beyond that of any vocabulary (30 nats) is not exponentiated."""
    return f"{math.exp(loss):,.1f}" if loss < 30 else "very large"


def duration(seconds: float) -> str:
    """Format seconds in the two largest units: 3725 -> 1 h 2 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def plain(value: object) -> str:
    """Format a logged value for a person: floats in four digits, lists up to MAX_LISTED items, nested names with values."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {plain(item)}" for name, item in value.items())
    if isinstance(value, list):
        more = f" and {len(value) - MAX_LISTED:,} more" if len(value) > MAX_LISTED else ""
        shown = [f"({plain(item)})" if isinstance(item, dict | list) else plain(item) for item in value[:MAX_LISTED]]
        return (", ".join(shown) or "none") + more
    return str(value)
