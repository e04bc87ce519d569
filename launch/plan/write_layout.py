"""Writes a layout into a configuration file, in place: its `parallel` section, and what it decides of `train`.

Only those places of the text change, so that comments and the order of keys stay. The new file is loaded and checked
beside the old one before it takes its place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from launch.plan.plan import Estimate
from pretrain.checks.check_run import load_checked

Edit = tuple[int, int, str]  # of the text: from, to, instead


def write_layout(path: Path, best: Estimate) -> None:
    """Change the file to this layout. Raises ConfigError, and leaves the file alone, where the result breaks a rule."""
    text = path.read_text(encoding="utf-8")
    beside = path.with_name(f".{path.stem}.layout.yaml")
    beside.write_text(edited(text, best.layout.settings(), best.train), encoding="utf-8")
    try:
        load_checked(beside, (), world_size=best.layout.ranks)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def edited(text: str, parallel: Mapping[str, Any], train: Mapping[str, Any]) -> str:
    """The text with another `parallel` section and these keys of `train`."""
    root: Any = yaml.compose(text)
    sections = {key.value: (key, value) for key, value in root.value}
    edits: list[Edit] = []
    whole = f"parallel: {flow(parallel)}"
    if "parallel" in sections:
        key, value = sections["parallel"]
        edits.append((key.start_mark.index, end_of(value), whole))
    else:
        edits.append((len(text), len(text), f"\n{whole}\n"))
    if "train" in sections and sections["train"][1].value:
        edits += keys_of(sections["train"][1], train)
    else:
        edits.append((len(text), len(text), f"\ntrain: {flow(train)}\n"))
    for start, end, instead in sorted(edits, reverse=True):
        text = text[:start] + instead + text[end:]
    return text


def keys_of(section: Any, settings: Mapping[str, Any]) -> list[Edit]:
    """Other values for the keys that a section has, and the missing ones before its first."""
    present = {key.value: value for key, value in section.value}
    edits = [
        (present[name].start_mark.index, end_of(present[name]), json.dumps(setting))
        for name, setting in settings.items()
        if name in present
    ]
    first = section.value[0][0].start_mark
    between = ", " if section.flow_style else "\n" + " " * first.column
    missing = [f"{name}: {json.dumps(setting)}{between}" for name, setting in settings.items() if name not in present]
    return [*edits, (first.index, first.index, "".join(missing))]


def end_of(node: Any) -> int:
    """Where a value ends, without the comments that follow it."""
    if isinstance(node, yaml.MappingNode) and not node.flow_style and node.value:
        return end_of(node.value[-1][1])
    return int(node.end_mark.index)


def flow(settings: Mapping[str, Any]) -> str:
    """A section on one line."""
    return "{" + ", ".join(f"{name}: {json.dumps(value)}" for name, value in settings.items()) + "}"
