"""From a YAML file and dotted overrides to a RunConfig, and back to text, schema and differences.

Loading has three steps. The file and all that it extends become one tree of entries that remember file and line
(yaml_tree.py). Overrides are laid over the tree, before validation, so they follow the same rules as the file. Then
pydantic validates the plain tree in strict mode, and each of its findings is put into our words: dotted key, value, rule
and fix, with the place where the key was written.

Problems are collected, not raised one by one: a user who starts a job from a queue should correct a file once. pydantic's
own messages are a last resort, because they name Python types and not what to write in YAML.
"""

from __future__ import annotations

import json
import locale
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from amfm.model.config.old_names import current_key
from amfm.model.config.plugins import leave_out_unset
from amfm.pretrain.config.errors import ConfigError, Origin, Problem
from amfm.pretrain.config.explain import explain, first_causes, shown
from amfm.pretrain.config.fields import section_at
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.config.yaml_tree import Entry, TreeReader, merge, read_tree, use_names_of_today

S = TypeVar("S", bound=BaseModel)

_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # PyYAML without libyaml has only the slow one
_OVERRIDE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*\Z")

# Settings that name one place; those of lists and caches find the home folder where they are used.
PATHS = (
    *("run.dir", "run.initial_weights", "data.store", "data.tokenizer.model", "train.replica_folder"),
    *("evaluate.include_path", "convert.teacher", "distill.teacher", "distill.store"),
)
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
SOURCE_PATH = re.compile(r"data\.sources\.\d+\.paths\.\d+")
NOT_RECORDED = "false # launch.setup is not recorded, because it may hold secrets"


@dataclass(frozen=True)
class LocatedConfig:
    """A RunConfig with the place of every key that was written (dotted key -> place)."""

    config: RunConfig
    origins: dict[str, Origin]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load the configuration of a YAML file with `a.b=value` overrides laid over it.

    Raises ConfigError with every problem found, FileNotFoundError if the file is absent. Touches no device.
    """
    return load_located(path, overrides).config


def load_located(path: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> LocatedConfig:
    """Load as `load_config` does, or from a dict of sections, keeping the places of keys, so that later rules can name file and line too."""
    return LocatedConfig(*read_schema(path, overrides, RunConfig))


def read_schema(
    given: str | Path | Mapping[str, Any], overrides: Sequence[str], schema: type[S], section: str | None = None
) -> tuple[S, dict[str, Origin]]:
    """Read a file or a dict of any schema with overrides laid over it, and the places of its keys; raises as `load_config`.

    section: read only this one, where the file has it.
    """
    problems: list[Problem] = []
    if isinstance(given, Mapping):
        tree = TreeReader("the dict", keep_lines=False).read(json.dumps(given))
    else:
        tree = read_tree(Path(given), problems)
    if section is not None and isinstance(tree.value, dict):
        tree = tree.value.get(section, tree)
    return resolve(tree, overrides, schema, problems)


def change_section(section: S, overrides: Sequence[str]) -> S:
    """Copy a section with `key=value` overrides laid over it; raises ConfigError as `load_config` does."""
    tree = TreeReader("the run", keep_lines=False).read(json.dumps(section.model_dump(mode="json")))
    return resolve(tree, overrides, type(section), [])[0]


def resolve(
    tree: Entry, overrides: Sequence[str], schema: type[S], problems: list[Problem]
) -> tuple[S, dict[str, Origin]]:
    """Lay overrides over a tree, in order, and validate it; returns the configuration and the places of its keys.

    Changes the tree. Raises ConfigError with the given problems and all others.
    """
    for override in overrides:
        apply_override(tree, override, problems, schema)
    use_names_of_today(tree, problems)
    expand_home(tree)
    load_plugins(tree, problems)
    problems += [control_problem(key, value) for key, value in paths_of(tree) if CONTROL.search(value)]
    origins, settings = tree.origins(), tree.plain()
    leave_out_unset(settings)  # after everything is laid over: a null removes a section from what is below it
    try:
        # JSON in strict mode: no text becomes a number, no number a truth value, and lists are fine for tuples.
        config = schema.model_validate_json(json.dumps(settings), strict=True)
    except ValidationError as error:
        problems += dict.fromkeys(explain(detail, schema) for detail in first_causes(error.errors(include_url=False)))
    if problems:
        raise ConfigError(problems).located(origins)
    return config, origins


def load_plugins(tree: Entry, problems: list[Problem]) -> None:
    """Import the folders that a configuration names, before its sections are validated; what is wrong becomes a problem."""
    named = tree.value.get("plugins") if isinstance(tree.value, dict) else None
    folders = named.value if named is not None and isinstance(named.value, list) else []
    if folders:
        from amfm.model.config.registering import load_named_folder
    for entry in folders:
        try:
            if isinstance(entry.value, str):
                load_named_folder(entry.value)
        except ValueError as error:
            problems.append(Problem("plugins", str(error), "", origin=entry.origin))


def apply_override(tree: Entry, override: str, problems: list[Problem], schema: type[BaseModel] = RunConfig) -> None:
    """Lay `a.b=value` over the tree; a bad override is appended to `problems`."""
    if not override.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in override):
        origin = Origin(f"override {override!a}")
        remedy = "set LC_ALL=C.UTF-8 or PYTHONUTF8=1, or write the value into the file"
        rule = f"its bytes are not text in this locale's encoding, {locale.getpreferredencoding(False)}"
        problems.append(Problem("", rule, remedy, origin=origin))
        return
    key, equals, text = override.partition("=")
    key = current_key(key.strip())
    if not equals or not _OVERRIDE.match(key):
        origin = Origin(f"override {override}")
        problems.append(Problem("", "not an override", "write key.key=value, such as train.steps=20", origin=origin))
        return
    origin = Origin(f"override {key}={text}")
    reader = TreeReader(origin.source, keep_lines=False)
    if text.startswith(("{", "*")) and takes_text(key, schema):
        value = Entry(text, origin)  # a pattern such as {retnet}* or *-, which YAML would read as a mapping or an alias
    else:
        value = reader.read(text) if text.strip() else Entry(None, origin)
    problems += reader.problems
    *parents, last = key.split(".")
    entry = tree
    for depth, part in enumerate(parents):
        child = step_into(entry, part, ".".join(parents[: depth + 1]), origin, problems)
        if child is None:
            return
        entry = child
    if isinstance(entry.value, list):
        item = step_into(entry, last, key, origin, problems)
        if item is not None:
            entry.value[int(last)] = merge(item, value)
    else:
        assert isinstance(entry.value, dict), "step_into returns mappings and lists only"
        entry.value[last] = merge(entry.value[last], value) if last in entry.value else value


def expand_home(tree: Entry) -> None:
    """Put the home folder for a leading `~` of a path, in place: no shell does it in a file, nor in `run.dir=~/x`."""
    for key in PATHS:
        entry: Entry | None = tree
        for part in key.split("."):
            entry = entry.value.get(part) if entry is not None and isinstance(entry.value, dict) else None
        if entry is not None and isinstance(entry.value, str):
            entry.value = os.path.expanduser(entry.value)


def paths_of(tree: Entry) -> Iterator[tuple[str, str]]:
    """Dotted key and value of every setting that names a place."""
    for key, value in flatten(tree.plain()).items():
        if isinstance(value, str) and (key in PATHS or SOURCE_PATH.fullmatch(key)):
            yield key, value


def control_problem(key: str, value: str) -> Problem:
    """A path with a line break or another control character, which no shell, log or launcher shows as it is."""
    return Problem(key, "has a control character", "use only printable characters", shown(value))


def takes_text(key: str, schema: type[BaseModel]) -> bool:
    """Whether the setting of this dotted key is a text."""
    *parents, last = key.split(".")
    section = section_at(tuple(parents), schema)
    info = section.model_fields.get(last) if section else None
    return info is not None and info.annotation in (str, str | None)


def step_into(entry: Entry, part: str, key: str, origin: Origin, problems: list[Problem]) -> Entry | None:
    """Find the child `part` of a mapping or list, made if a mapping lacks it; None after noting a problem."""
    if isinstance(entry.value, list):
        if not part.isdigit() or int(part) >= len(entry.value):
            rule = f"{key.rpartition('.')[0]} is a list of {len(entry.value)}, so {part} is not a position in it"
            problems.append(Problem("", rule, "use a smaller one, counted from 0", origin=origin))
            return None
        return entry.value[int(part)]
    assert isinstance(entry.value, dict), "step_into is asked for mappings and lists only"
    child = entry.value.get(part)
    if child is None or child.value is None:
        child = entry.value[part] = Entry({}, origin)
    if not isinstance(child.value, (dict, list)):
        remedy = f"override {key} itself"
        problems.append(Problem("", f"{key} is the value {shown(child.plain())}, not a section", remedy, origin=origin))
        return None
    return child


def resolved_yaml(config: RunConfig) -> str:
    """Write the whole configuration, defaults included, as YAML that `load_config` reads back to an equal one."""
    tree = config.model_dump(mode="json")
    return str(yaml.dump(tree, Dumper=_DUMPER, sort_keys=False, allow_unicode=True, width=120))


def without_secrets(config: RunConfig) -> RunConfig:
    """Copy the configuration for records, with `launch.setup` replaced, a line for shells that may hold tokens.

    What stands there instead is a command that fails, so a record used as a configuration cannot run without its setup.
    """
    if config.launch.setup is None:
        return config
    return config.model_copy(update={"launch": config.launch.model_copy(update={"setup": NOT_RECORDED})})


def config_schema() -> dict[str, Any]:
    """Build the JSON Schema of a configuration file, for editors.

    Nothing is `required` in it: any key may come from an extended file or an override. `load_config` finds what is
    missing.
    """
    schema = drop_required(RunConfig.model_json_schema())
    extends = {"type": "string", "description": "Another YAML file, relative to this one, that this one is laid over."}
    schema["properties"] = {"extends": extends} | schema["properties"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema | {"title": "amfm run configuration"}


def drop_required(schema: Any) -> Any:
    """Copy a JSON Schema without its `required` lists, at any depth; a property of that name stays."""
    if isinstance(schema, dict):
        return {
            key: drop_required(value)
            for key, value in schema.items()
            if not (key == "required" and isinstance(value, list))
        }
    return [drop_required(item) for item in schema] if isinstance(schema, list) else schema


@dataclass(frozen=True)
class Difference:
    """A key whose value differs; `absent` stands for a key that one side does not have."""

    key: str
    first: object
    second: object

    absent = "(absent)"

    def __str__(self) -> str:
        return f"{self.key}: {self.first} -> {self.second}"


def diff_configs(first: RunConfig, second: RunConfig) -> list[Difference]:
    """List the keys in which two configurations differ, in the order of the schema."""
    flat_first, flat_second = flatten(first.model_dump(mode="json")), flatten(second.model_dump(mode="json"))
    keys = dict.fromkeys([*flat_first, *flat_second])
    absent = Difference.absent
    pairs = [Difference(key, flat_first.get(key, absent), flat_second.get(key, absent)) for key in keys]
    return [pair for pair in pairs if pair.first != pair.second]


def flatten(value: object, prefix: str = "") -> dict[str, object]:
    """Flatten nested settings to dotted key -> scalar; an item of a list is named by its position."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if children is None:
        return {prefix: value}
    flat: dict[str, object] = {}
    for key, child in children:
        flat |= flatten(child, f"{prefix}.{key}" if prefix else str(key))
    return flat
