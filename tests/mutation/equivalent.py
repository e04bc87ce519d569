"""Changes that nothing can see, or that nothing should: (source, line, before, after) -> why."""

from __future__ import annotations

EQUIVALENT: dict[tuple[str, str, str, str], str] = {}
