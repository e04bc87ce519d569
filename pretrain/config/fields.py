"""The fields of the configuration, read off the schema: for tables of help, for the docs, for near-miss keys.

The pydantic classes are the only source: their annotations, bounds, defaults and descriptions give the tables of `amfm
config`, docs/configuration.md and the fixes of errors, so none of these can go stale. A section is a nested class, or
a tuple of them, whose items share one row under the position `*`.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from amfm.model.config.plugins import PluginSections
from amfm.model.config.variants import Variants
from amfm.pretrain.config.rarely_set import user_of
from amfm.pretrain.config.schema import RunConfig

# Sections of a stage that have the settings of another section.
REPEATED = ("stages.*.rope", "stages.*.schedule", "stages.*.parallel")
ITEM = "*"  # stands for the position in a list of sections: data.sources.*.weight

_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclass(frozen=True)
class FieldRow:
    """One setting: dotted key, type with its bounds, default as YAML writes it (None: must be given), meaning.

    `user`: the page that says when it is set; None for a setting that presets or recipes set.
    """

    key: str
    type: str
    default: str | None
    meaning: str
    user: str | None


@dataclass(frozen=True)
class SectionRow:
    """One section: dotted key, what it is about, and its own fields."""

    key: str
    meaning: str
    fields: tuple[FieldRow, ...]


def describe_sections(
    model: type[BaseModel] = RunConfig, prefix: str = "", *, of_packages: bool = True
) -> Iterator[SectionRow]:
    """Yield every section below `model` in the order of the schema, sections in sections after their parent.

    of_packages: also those that installed packages register.
    """
    if prefix:
        rows = [
            describe_field(f"{prefix}.{name}", info)
            for name, info in model.model_fields.items()
            if section_of(info.annotation) is None
        ]
        meaning = (model.__doc__ or "").strip().splitlines()[0]
        yield SectionRow(prefix, meaning, tuple(rows))
    for name, info in model.model_fields.items():
        section = section_of(info.annotation)
        is_packaged = issubclass(model, PluginSections) and name in model.packages
        if section is not None and (of_packages or not is_packaged):
            child, is_list = section
            key = f"{prefix}.{name}" if prefix else name
            yield from describe_sections(child, f"{key}.{ITEM}" if is_list else key, of_packages=of_packages)


def describe_fields(root: type[BaseModel] = RunConfig, *, of_packages: bool = True) -> list[FieldRow]:
    """List every setting in the sections below `root`, in the order of the schema."""
    return [row for section in describe_sections(root, of_packages=of_packages) for row in section.fields]


def describe_field(key: str, info: FieldInfo) -> FieldRow:
    """Describe one setting: type in words with its bounds, default as YAML writes it, meaning."""
    bounds = [
        f"{sign} {getattr(rule, name):g}"
        for rule in info.metadata
        for name, sign in _BOUNDS.items()
        if getattr(rule, name, None) is not None
    ]
    kind = name_type(info.annotation)
    if bounds and kind.endswith(" or null"):
        kind = f"{kind.removesuffix(' or null')} {', '.join(bounds)} or null"
    elif bounds:
        kind = f"{kind} {', '.join(bounds)}"
    default = None if info.default is PydanticUndefined else show_value(info.default)
    return FieldRow(key, kind, default, info.description or "", user_of(key))


def section_of(annotation: Any) -> tuple[type[BaseModel], bool] | None:
    """Find (section, is a list of them) in an annotation such as `Section`, `Section | None`, `tuple[Section, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    if typing.get_origin(annotation) is tuple:
        inner = section_of(typing.get_args(annotation)[0])
        return (inner[0], True) if inner else None
    if typing.get_origin(annotation) in {typing.Union, types.UnionType}:
        for argument in typing.get_args(annotation):
            inner = section_of(argument)
            if inner:
                return inner
    return None


def section_at(parts: tuple[str | int, ...], root: type[BaseModel] = RunConfig) -> type[BaseModel] | None:
    """Find the section class at a path of keys and list positions below `root`; None if the schema has no section."""
    model = root
    for part in parts:
        if isinstance(part, int) or part.isdigit():
            continue
        info = model.model_fields.get(part)
        found = section_of(info.annotation) if info else None
        inside = Variants.section_named(part) if model is Variants else found[0] if found else None
        if inside is None:
            return None
        model = inside
    return model


def name_type(annotation: Any) -> str:
    """Name a type in words: `int`, `string`, `float or null`, `softmax | sigmoid`, `list of string`."""
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return " | ".join(show_value(value) for value in typing.get_args(annotation))
    if origin is tuple:
        return f"list of {name_type(typing.get_args(annotation)[0])}"
    if origin in {dict, Mapping}:
        return " to ".join(name_type(argument) for argument in typing.get_args(annotation)) + " mapping"
    if origin in {typing.Union, types.UnionType}:
        return " or ".join(name_type(argument) for argument in typing.get_args(annotation))
    names = {str: "string", type(None): "null", bool: "true | false", int: "int", float: "float"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def show_value(value: object) -> str:
    """Format a scalar as YAML writes it, on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e6:
        return f"{value:.1f}"
    return str(value)


def reference_page() -> str:
    """Compose docs/configuration.md: every section and setting as Markdown tables."""
    lines = [
        "# Configuration",
        "",
        "<!-- Written by `make docs` (`amfm config --reference`); change the descriptions in the schema, not here. -->",
        "",
        "One YAML file is one run.",
        "",
        "- `extends: other.yaml` (relative to the file) lays a file over another one: sections merge key by key, a list",
        "  or a plain value replaces what was below, `null` removes an optional section.",
        "- Dotted overrides come last: `amfm train run.yaml train.steps=20 model.moe.top_k=2 data.sources.0.weight=2`.",
        "- A path that begins with `~` is in the home folder; relative paths start where the command is called.",
        "- `1e-3` is a number, `1e6` an integer, `no` and `on` are strings; quote a string that looks like a number.",
        "- An unknown key, a wrong type or a value out of range stops before anything starts (exit code 2), with the",
        "  file, line, key, value, rule and fix of every problem at once.",
        "- `amfm config run.yaml` prints the resolved file, `--diff OTHER` what two runs differ in, `--ranks 8` checks",
        "  that this many ranks can share its batch.",
        "- Editors complete and check keys with `configs/schema.json`: put the line",
        "  `# yaml-language-server: $schema=schema.json` (the path from the file) on top.",
        "",
    ]
    lines += [
        "Settings of presets and recipes come first; the others name the page that describes when to set them.",
        "",
    ]
    for section in describe_sections(of_packages=False):
        if section.key.startswith(REPEATED):
            continue
        lines += [f"## `{section.key}`", "", section.meaning, ""]
        lines += setting_table(sorted(section.fields, key=lambda row: row.user is not None))
        if section.key == "stages.*":
            lines += [
                "Its `rope`, `schedule` and `parallel` are as the sections of that name; what is left out is as before.",
                "",
            ]
    return "\n".join(lines).rstrip() + "\n"


def setting_table(rows: Sequence[FieldRow]) -> list[str]:
    """Lines of a Markdown table of settings, with the pages of those that are rarely set; none without settings."""
    if not rows:
        return []
    has_users = any(row.user is not None for row in rows)
    lines = ["| key | type | default | meaning |" + " page |" * has_users, "|---|---|---|---|" + "---|" * has_users]
    for row in rows:
        default = "required" if row.default is None else f"`{row.default}`"
        name = row.key.rsplit(".", 1)[1]
        kind, meaning = (text.replace("|", "\\|") for text in (row.type, row.meaning))
        page = (row.user or "").removeprefix("docs/")
        link = f" [{page.removesuffix('.md')}]({page}) |" if page else " |" * has_users
        lines.append(f"| `{name}` | {kind} | {default} | {meaning} |{link}")
    return [*lines, ""]


def flatten_settings(section: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted names; sections in a list are named by their position, from 0.

    A list of plain values stays one setting.
    """
    if isinstance(section, dict):
        items = [(str(key), value) for key, value in section.items()]
    elif isinstance(section, list) and section and isinstance(section[0], dict):
        items = [(str(index), value) for index, value in enumerate(section)]
    else:
        return {prefix: section}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= flatten_settings(value, f"{prefix}.{key}" if prefix else key)
    return flat
