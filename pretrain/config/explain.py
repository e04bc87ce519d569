"""What is wrong with a value of a configuration, in words: its rule, the nearest key or value, and a fix."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from amfm.model.config.plugins import EXAMPLES, PluginSections, how_to_install
from amfm.pretrain.config.errors import Problem
from amfm.pretrain.config.fields import describe_fields, name_type, section_at, section_of, show_value

Schema = type[BaseModel]
Parts = tuple[str | int, ...]
_KINDS = {
    "int_type": ("must be an integer", "write it without quotes, fraction or unit"),
    "float_type": ("must be a number", "write it without quotes or unit"),
    "bool_type": ("must be true or false", "write `true` or `false` without quotes"),
    "string_type": ("must be text", "put it in quotes if it looks like a number or starts with {"),
    "dict_type": ("must be a mapping", "write `{name: value}`, or one `name: value` a line below it"),
    "tuple_type": ("must be a list", "write `[a, b]`, or one `- item` a line"),
    "model_type": ("must be a section with keys", "write its keys indented below it, or remove the line"),
    "model_attributes_type": ("must be a section with keys", "write its keys indented below it, or remove the line"),
    "greater_than": ("must be greater than {gt}", "raise it"),
    "greater_than_equal": ("must be at least {ge}", "raise it"),
    "less_than": ("must be less than {lt}", "lower it"),
    "less_than_equal": ("must be at most {le}", "lower it"),
    "string_pattern_mismatch": ("must match {pattern}", "use only those characters"),
    "string_too_short": ("must have at least {min_length} character(s)", "fill it in"),
    "too_short": ("must have at least {min_length} item(s)", "add one"),
    "finite_number": ("must be finite", "write an ordinary number"),
}
# What other programs call a setting, if no spelling shows the way.
OTHER_NAMES = {
    **dict.fromkeys(("mlp", "ffn", "dense", "model.mlp", "model.ffn", "model.dense"), "model.feed_forward"),
    "optimizer.lr": "optimizer.learning_rate",
    "train.max_steps": "train.steps",
    "train.profile.start_step": "train.profile.steps: [5]",
    **dict.fromkeys(("report_to", "run.report_to"), "run.tensorboard and run.wandb_project"),
}
# What other programs call a value.
OTHER_VALUES = {("schedule.kind", "linear"): "wsd with schedule.decay_shape: linear"}


def first_causes(details: Sequence[Any]) -> list[Any]:
    """Filter pydantic's findings: drop "too few items" where an item itself was rejected, which causes it."""
    return [
        detail
        for detail in details
        if detail["type"] != "too_short"
        or not any(other is not detail and other["loc"][: len(detail["loc"])] == detail["loc"] for other in details)
    ]


def explain(detail: Any, schema: Schema) -> Problem:
    """Translate one finding of pydantic into a problem with rule and fix; unknown kinds keep its message."""
    parts: tuple[str | int, ...] = detail["loc"]
    value = shown(detail["input"])
    if union := union_at(parts[:-1], schema):  # pydantic has a finding per member, with the member after the key
        key = ".".join(str(part) for part in parts[:-1])
        return Problem(key, f"must be {name_type(union)}", meaning_of(parts[:-1], schema) or "correct it", value)
    key = ".".join(str(part) for part in parts)
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return Problem(key, "unknown key", nearest_key(parts, schema), value)
    if kind == "missing":
        return explain_missing(parts, schema)
    if kind == "literal_error":
        return explain_choice(parts, detail["input"], value, schema)
    if kind in _KINDS:
        rule, remedy = _KINDS[kind]
        if kind == "string_type" and detail["input"] is None:
            rule, remedy = "has no value", f"give it one ({meaning_of(parts, schema)}), or leave the key out"
        if kind.startswith("float_type") and isinstance(detail["input"], str):
            remedy = "write it as a plain number such as 0.001 or 1e-3, without quotes or unit"
        return Problem(key, rule.format(**{name: plain_number(item) for name, item in context.items()}), remedy, value)
    return Problem(
        key, str(detail["msg"]).removeprefix("Value error, "), meaning_of(parts, schema) or "correct it", value
    )


def union_at(parts: Parts, schema: Schema) -> Any:
    """The annotation of a setting that takes values of several types, such as `bool | Literal["wide"]`; None for others."""
    section = section_at(parts[:-1], schema) if parts else None
    info = section.model_fields.get(str(parts[-1])) if section else None
    if info is None or get_origin(info.annotation) not in (Union, UnionType) or section_of(info.annotation):
        return None
    members = [item for item in get_args(info.annotation) if item is not type(None)]
    plain = all(get_origin(item) in (None, Literal) for item in members)
    return info.annotation if plain and len(members) > 1 else None


def explain_missing(parts: Parts, schema: Schema) -> Problem:
    """Describe a missing key or section that has no default: what to add, and which keys a section needs at least."""
    key, parent = ".".join(str(part) for part in parts), section_at(parts[:-1], schema)
    info = parent.model_fields.get(str(parts[-1])) if parent else None
    section = section_of(info.annotation) if info else None
    if section is None:
        return Problem(key, "is missing and has no default", f"add `{parts[-1]}:` ({meaning_of(parts, schema)})")
    child, is_list = section
    needed = [name for name, field in child.model_fields.items() if field.is_required()]
    shape = "a list of sections, each" if is_list else "a section"
    keys = f"at least {', '.join(needed)}" if needed else f"keys such as {', '.join(list(child.model_fields)[:3])}"
    return Problem(key, "is missing", f"add `{parts[-1]}:`, {shape} with {keys}")


def explain_choice(parts: Parts, given: object, value: str, schema: Schema) -> Problem:
    """Describe a value that is not among the allowed ones.

    The fix is ours for a value of other programs, the nearest in spelling, `auto` if there is one, or the first.
    """
    parent = section_at(parts[:-1], schema)
    assert parent is not None, f"no section holds {parts}"
    allowed = [show_value(item) for item in literal_values(parent.model_fields[str(parts[-1])].annotation)]
    near = difflib.get_close_matches(str(given), allowed, n=1)
    key, names = ".".join(str(part) for part in parts), ", ".join(allowed)
    remedy = OTHER_VALUES.get((".".join(str(part) for part in parts[-2:]), str(given)))
    if remedy is None:
        example = "auto" if "auto" in allowed else f"for example {allowed[0]}"
        remedy = near[0] if near else example
    return Problem(key, f"must be one of: {names}", f"use {remedy}", value)


def literal_values(annotation: Any) -> list[object]:
    """List the members of a Literal, also inside `Literal[...] | None`."""
    found: list[object] = []
    for item in get_args(annotation):
        found += literal_values(item) if get_args(item) else [item]
    return [item for item in found if item is not type(None)]


def nearest_key(parts: Parts, schema: Schema) -> str:
    """Find the fix for an unknown key: a near miss in its section, the section where the key exists, or all keys here.

    A near miss must be nearer where the very word exists elsewhere: then a wrong section is likelier than a typo.
    """
    section, word = section_at(parts[:-1], schema), str(parts[-1])
    assert section is not None, f"no section holds {parts}"
    names = list(section.model_fields)
    place = "".join(f"{part}." for part in parts[:-1])
    if "." in word:
        return "nest it: a dot joins sections in overrides only"
    elsewhere = [row.key for row in describe_fields(schema) if row.key.rsplit(".", 1)[-1] == word]
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.8 if elsewhere else 0.6)
    if f"{place}{word}" in OTHER_NAMES:
        return f"it is {OTHER_NAMES[f'{place}{word}']} here"
    is_of_package = issubclass(section, PluginSections) and word in EXAMPLES
    if near and not is_of_package:
        return f"did you mean {place}{near[0]}?"
    known = f"known keys here: {', '.join(names) or 'none'}"
    if elsewhere and not place:
        return f"it belongs elsewhere: {' or '.join(elsewhere)}"
    if elsewhere:
        return f"{known}; elsewhere there is {' or '.join(elsewhere)}"
    if issubclass(section, PluginSections):
        unknown = f"install the package that registers it under the entry point group {section.group}"
        return f"{how_to_install(word, unknown)}; {known}"
    return known


def meaning_of(parts: Parts, schema: Schema) -> str:
    """Look up the description of a field, without its last full stop; empty if there is no such field."""
    parent = section_at(parts[:-1], schema)
    info = parent.model_fields.get(str(parts[-1])) if parent and parts else None
    return (info.description or "").rstrip(".") if info else ""


def shown(value: object) -> str:
    """Format a value as a message shows it: JSON, cut at 80 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def plain_number(value: object) -> str:
    """Format a bound without a needless `.0`."""
    return f"{value:g}" if isinstance(value, float) else str(value)
