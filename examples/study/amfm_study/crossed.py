"""The settings of a study, crossed: every entry with every value of each axis of its grid, and what follows from them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from amfm.pretrain.config.errors import ConfigError, Problem
from amfm.pretrain.config.file import load_config
from amfm_study.expressions import evaluate
from amfm_study.study import SettingsStudyConfig


@dataclass(frozen=True)
class Crossed:
    """One setting of a study: its label, its overrides, and its value on each axis of the grid."""

    label: str
    overrides: tuple[str, ...]
    values: tuple[tuple[str, Any], ...] = ()


def cross(config: SettingsStudyConfig, task: Path) -> Iterator[Crossed]:
    """Every setting with every value of the grid, for the run configuration of a task.

    Derived settings are computed from that configuration as it is with these overrides, in order, so one may read those
    before it. Raises ConfigError for an expression without a value.
    """
    entries = [(entry.label, entry.overrides) for entry in config.settings] or [("", ())]
    axes = [name_axis(key, values) for key, values in config.grid.items()]
    for label_of_entry, given in entries:
        for point in itertools.product(*axes):
            values = [(key, value) for _, key, value in point]
            label = "-".join(filter(None, [label_of_entry, *(name for name, _, _ in point)]))
            overrides = [*given, *(f"{key}={json.dumps(value)}" for key, value in values)]
            for key, text in config.derived.items():
                overrides.append(f"{key}={derive(key, text, task, overrides, dict(values))}")
            yield Crossed(label or "base", tuple(overrides), tuple(values))


def name_axis(key: str, values: Sequence[Any]) -> list[tuple[str, str, Any]]:
    """Name, key and value of each point of an axis; where names without symbols are alike, as of patterns, they are numbered."""
    names = [name_value(key, value) for value in values]
    texts = {json.dumps(value) for value in values}
    if len(set(names)) < len(names) == len(texts):
        names = [f"{name}_{number}" for number, name in enumerate(names, 1)]
    return [(name, key, value) for name, value in zip(names, values, strict=True)]


def name_value(key: str, value: Any) -> str:
    """Name one value of an axis, fit for a folder: `learning_rate_0.002`."""
    return re.sub(r"[^A-Za-z0-9_.]+", "_", f"{key.rpartition('.')[2]}_{value}").strip("_")


def derive(key: str, text: str, task: Path, overrides: list[str], values: dict[str, Any]) -> str:
    """The value of an expression as an override has it; names are settings, in full, of the model, or of the grid's axes."""
    run = load_config(task, overrides)
    axes = {axis.rpartition(".")[2]: value for axis, value in values.items()} | values

    def value_of(name: str) -> object:
        if name in axes:
            return axes[name]
        for place in (name, f"model.{name}"):
            try:
                return attrgetter(place)(run)
            except AttributeError:
                continue
        raise ValueError(f"reads {name}, which is not a setting of the run, of its model, or of the grid")

    try:
        return json.dumps(evaluate(text, value_of))
    except ValueError as error:
        problem = Problem(f"derived.{key}", str(error), "write for example hidden_size // 16", text)
        raise ConfigError([problem]) from error
