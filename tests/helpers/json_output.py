"""What a verb prints for scripts with --json."""

from __future__ import annotations

import json


def one_object(text: str) -> dict[str, object]:
    """The one JSON object that a text must be."""
    value = json.loads(text)
    assert isinstance(value, dict)
    return value
