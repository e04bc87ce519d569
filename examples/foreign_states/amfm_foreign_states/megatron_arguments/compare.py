"""Refuses to import a checkpoint whose recorded arguments contradict the configuration that is to continue it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from amfm.model.config.pattern import parse_pattern
from amfm.pretrain.config.schema import RunConfig
from amfm_foreign_states.megatron_arguments.sources import read_folder
from amfm_foreign_states.megatron_arguments.table import Arguments, Effect, Line, read_table, same
from amfm_foreign_states.megatron_arguments.translation import translate

MAX_NAMED = 20


def check_recorded(path: Path, config: RunConfig, *, has_moments: bool, changed: Collection[str] = ()) -> None:
    """Compare the arguments that a checkpoint records with the configuration of the run that continues.

    Compared are those of the model, and with moments those of training too; not layout, files and logs, which change no
    number. `changed`: arguments that are changed on purpose. Raises ValueError with both values of each difference, and for
    a name of `changed` that does not differ; does nothing if no arguments are recorded.
    """
    given = read_folder(path)
    if given is None:
        if changed:
            raise ValueError(f"{path} records no arguments, so none is changed; leave out --changed")
        return
    names = {read_table().resolve(name, None)[0] for name in changed}
    effects: set[Effect] = {"w", "t"} if has_moments else {"w"}
    found = list(differences(given, config, effects))
    surplus = sorted(names - {name for name, _ in found})
    if surplus:
        raise ValueError(
            f"--changed {surplus[0]}: {given.where} and the configuration do not differ in it; leave it out"
        )
    left = [text for name, text in found if name not in names]
    if left:
        more = f"; and {len(left) - MAX_NAMED} more" if len(left) > MAX_NAMED else ""
        raise ValueError(
            f"{given.where} contradicts the configuration: {'; '.join(left[:MAX_NAMED])}{more}. Correct the configuration, or "
            "name what the run changes on purpose (--changed NAME for each)"
        )


def differences(given: Arguments, config: RunConfig, effects: set[Effect]) -> Iterator[tuple[str, str]]:
    """Iterate over arguments that differ, each with both values."""
    table = read_table()
    known: dict[str, Any] = {"hidden_size": config.model.hidden_size}
    if given["num_layers"] is None and given["hybrid_layer_pattern"] is None:
        known["hybrid_layer_pattern"] = config.model.pattern
    if config.model.attention is not None:
        known["num_attention_heads"] = config.model.attention.num_heads
    # What a record lacks cannot contradict.
    translated = translate(replace(given, given=known | dict(given.given)))
    for found in translated.lines.values():
        # Arguments that were recorded; settings that come only of defaults are guesses.
        names = [name for name in found.names if name in given.given]
        rows = [table.by_name[name] for name in found.names if name in table.by_name]
        if not names or not any(row.effect in effects for row in rows):
            continue
        ours = value_of(config, found.setting)
        if found.is_approximate or not is_equal(found, ours):
            there = ", ".join(f"{name}={given.given[name]!r}" for name in names if given.given[name] is not None)
            what = f" ({found.note})" if found.note else ""
            said = there or f"{names[0]}=None"
            meant = f"is not there{what}" if found.is_approximate else f"means {found.setting}={wanted(found)!r}"
            yield names[0], f"{said} {meant}, and {found.setting} is {ours!r}"
    for missing in translated.missing:
        row = missing.row
        if row is not None and row.effect in effects and not missing.is_default:
            note = f": {row.note}" if row.note else ""
            yield missing.name, f"{missing.name}={missing.value!r} is not there{note}"


def is_equal(found: Line, ours: Any) -> bool:
    """Whether a setting has the value that arguments mean; a pattern by its blocks, whatever cuts it has."""
    theirs = wanted(found)
    if found.setting == "model.pattern" and isinstance(ours, str):
        blocks = [(text.letters, text.depth_letters, text.num_depths) for text in map(parse_pattern, (theirs, ours))]
        return blocks[0] == blocks[1]
    return same(theirs, ours)


def wanted(found: Line) -> Any:
    """The value of a line; of one that is not set there, the default that the setting has here."""
    return default_of(found.setting) if found.is_unset else found.value


def default_of(setting: str) -> Any:
    """The default of a setting, None if it has none."""
    model: Any = RunConfig
    default: Any = None
    for part in setting.split("."):
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return None
        default = None if field.default is PydanticUndefined else field.default
        kinds = getattr(field.annotation, "__args__", (field.annotation,))
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return default


def value_of(config: RunConfig, setting: str) -> Any:
    """The value of a setting in a configuration; what a section that is not there would have by default."""
    value: Any = config
    for part in setting.split("."):
        value = getattr(value, part, None)
        if value is None:
            return default_of(setting)
    return value
