"""All settings that arguments of Megatron-LM describe, and what of them is not there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from amfm.model.config.structure import PLAIN
from amfm_foreign_states.megatron_arguments.model_settings import model_lines
from amfm_foreign_states.megatron_arguments.table import Arguments, Line, Row, read_table
from amfm_foreign_states.megatron_arguments.training_settings import training_lines

# Sections of the model, and the letter without which they are left out.
NEEDED = {
    "model.mamba.": "M",
    "model.attention.": "*",
    "model.feed_forward.": "-",
    "model.moe.": "E",
    "model.mtp.": "/",
    "model.mixers.mla.": "+",
    "model.mixers.gated_deltanet.": "G",
}
ROTARY = {
    "model.attention.rope.": "model.attention.positions",
    "model.mixers.mla.rope_theta": "model.mixers.mla.positions",
}
GATED = {
    "model.feed_forward.activation_limit": "model.feed_forward.activation",
    "model.moe.activation_limit": "model.moe.activation",
}


@dataclass(frozen=True)
class Missing:
    """An argument that nothing here does the same as; `row`: None for one that the table does not have."""

    name: str
    value: Any
    row: Row | None
    is_default: bool = False


@dataclass(frozen=True)
class Translation:
    """Settings in order, by their name, and arguments that are missing here."""

    given: Arguments
    lines: dict[str, Line]
    missing: tuple[Missing, ...]


def translate(given: Arguments) -> Translation:
    """Translate arguments. Raises ValueError if the model is not described."""
    lines = {found.setting: found for found in model_lines(given)}
    pattern = lines["model.pattern"].value
    plain = dict(equal_lines(given))
    lines |= {found.setting: found for found in training_lines(given, pattern)}
    values = {setting: found.value for setting, found in lines.items()}
    for setting, found in plain.items():
        if setting not in lines and applies(setting, pattern, values):
            lines[setting] = found
    return Translation(given, lines, tuple(find_missing(given)))


def equal_lines(given: Arguments) -> Iterator[tuple[str, Line]]:
    """Settings of rows whose value is the same, of what was given and of what has an effect on numbers."""
    for row in read_table().rows:
        name = row.names[0]
        if row.kind == "=" and (name in given.given or row.effect != "-"):
            for setting in row.settings:
                yield setting, Line(setting, given[name], (name,), is_unset=given[name] is None)


def applies(setting: str, pattern: str, values: dict[str, Any]) -> bool:
    """Whether the model has what a setting is about."""
    for prefix, letter in NEEDED.items():
        if setting.startswith(prefix) and letter not in pattern:
            return False
    for prefix, positions in ROTARY.items():
        if setting.startswith(prefix) and values.get(positions) != "rope":
            return False
    return setting not in GATED or values.get(GATED[setting]) not in PLAIN


def find_missing(given: Arguments) -> Iterator[Missing]:
    """Arguments whose value asks for something that is not there, and defaults that do; then those that are not known."""
    table = read_table()
    for row in table.rows:
        for name in row.names:
            if name in given.given and not row.is_equal(name, given.given[name]):
                yield Missing(name, given.given[name], row)
            elif name not in given.given and given.is_flags and not row.is_equal(name, row.default_of(name)):
                yield Missing(name, row.default_of(name), row, is_default=True)
    for name, value in given.given.items():
        if name not in table.by_name:
            yield Missing(name, value, None)
