"""Rules that drop documents before tokenizing.

They see one text at a time and are part of a unit's key, so changing them writes again what they could change. What they drop
is a reject with the rule that dropped it: a filter that takes too much shows in the rejects file.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from amfm.data_pipeline.config import FilterConfig

Filter = Callable[[str], str | None]


def make_filter(config: FilterConfig, source: str) -> Filter | None:
    """Make the function that says why a text is dropped, None for a text that stays; None without any filter.

    Raises ValueError for a bad pattern.
    """
    if config == FilterConfig():
        return None
    keep = _compile(config.keep_pattern, f"source {source!r}: filters.keep_pattern")
    drop = _compile(config.drop_pattern, f"source {source!r}: filters.drop_pattern")

    def reason_to_drop(text: str) -> str | None:
        if len(text) < config.min_characters:
            return f"filter: {len(text)} characters, fewer than min_characters={config.min_characters}"
        if config.max_characters is not None and len(text) > config.max_characters:
            return f"filter: {len(text)} characters, more than max_characters={config.max_characters}"
        if keep is not None and not keep.search(text):
            return f"filter: keep_pattern {keep.pattern!r} not found"
        if drop is not None and (found := drop.search(text)):
            return f"filter: drop_pattern {drop.pattern!r} found at character {found.start()}"
        return None

    return reason_to_drop


def _compile(pattern: str | None, where: str) -> re.Pattern[str] | None:
    """Compile a pattern if there is one; ValueError names its setting."""
    if pattern is None:
        return None
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where}={pattern!r} is not a regular expression ({error}); correct it") from error
