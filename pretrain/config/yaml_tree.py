"""Reads YAML into a tree that keeps the file and line of every key, and merges such trees.

Scalars follow the YAML 1.2 core rules rather than PyYAML's 1.1: `1e-3` is a number, `on`, `no` and `2026-01-01` are
text. An integer in exponent form (`1e6`) is an integer, so that counts can be written short, and so is `3000000.0`, which
`yaml.dump` makes of 3e6.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from amfm.data_pipeline.durable.json_files import read_bounded
from amfm.model.config.old_names import use_current_names
from amfm.pretrain.config.errors import ConfigError, Origin, Problem

Scalar = str | int | float | bool | None

_NULL = re.compile(r"(~|null|Null|NULL|)\Z")
_TRUE = re.compile(r"(true|True|TRUE)\Z")
_FALSE = re.compile(r"(false|False|FALSE)\Z")
_INTEGER = re.compile(r"[-+]?[0-9]+(_[0-9]+)*\Z")
_WHOLE_EXPONENT = re.compile(r"([-+]?[0-9]+)(\.0*)?[eE]\+?([0-9]{1,2})\Z")
_WHOLE_FRACTION = re.compile(r"([-+]?[0-9]+)\.0+\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_COLONLESS = re.compile(r"\s*[A-Za-z_]\w*(:\S[^{}\[\]\"']*|\s+[\w.+-]+)?\s*\Z")  # `steps 400`, `steps:400`, `steps`
# Bounds far above any configuration: aliases can make a small file expand without end.
MAX_NODES = 100_000
MAX_DEPTH = 64
MAX_BYTES = 1 << 20
MAX_DIGITS = 100  # of an integer; what has more is text, and rejected if a number must be
_TAG = "a tag"
_SPECIAL = {".inf": float("inf"), "+.inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan")}


@dataclass
class Entry:
    """A value with the place where its key was written; mappings and lists hold further entries."""

    value: Scalar | dict[str, Entry] | list[Entry]
    origin: Origin

    def plain(self) -> object:
        """Strip the places: returns dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: entry.plain() for key, entry in self.value.items()}
        if isinstance(self.value, list):
            return [entry.plain() for entry in self.value]
        return self.value

    def origins(self, prefix: str = "") -> dict[str, Origin]:
        """Map dotted key -> place, for this entry and everything below it; the entry itself has the key `prefix`."""
        found = {prefix: self.origin}
        if isinstance(self.value, dict):
            children = list(self.value.items())
        elif isinstance(self.value, list):
            children = [(str(index), entry) for index, entry in enumerate(self.value)]
        else:
            children = []
        for key, entry in children:
            found |= entry.origins(f"{prefix}.{key}" if prefix else key)
        return found


def parse_scalar(text: str) -> Scalar:
    """Resolve an unquoted scalar by YAML 1.2's core rules; what is not null, truth value or number is text."""
    if _NULL.match(text):
        return None
    if _TRUE.match(text):
        return True
    if _FALSE.match(text):
        return False
    if len(text) > MAX_DIGITS:
        return text
    if _INTEGER.match(text):
        return int(text)
    whole = _WHOLE_EXPONENT.match(text)
    if whole:
        return int(whole.group(1)) * 10 ** int(whole.group(3))
    if whole := _WHOLE_FRACTION.match(text):
        return int(whole.group(1))
    if _FLOAT.match(text):
        return float(text)
    return _SPECIAL.get(text.lower(), text)


class _Untagged(yaml.SafeLoader):
    """Rejects tags (`!!binary`, `!mine`): what they ask for is not done, and a value that is read otherwise is wrong."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node that has no tag. Raises RecursionError far below Python's limit: each level costs more than the last."""
        event: Any = self.peek_event()
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise yaml.MarkedYAMLError(problem=f"{_TAG} {tag[:80]!r}, which is not read", problem_mark=event.start_mark)
        if self.depth > MAX_DEPTH:
            raise RecursionError(f"more than {MAX_DEPTH} levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


@lru_cache(maxsize=16)
def _compose(text: str) -> yaml.Node | None:
    """Parse a text, most of the time of loading a configuration, once: a study loads the same file for each of its cells."""
    return yaml.compose(text, Loader=_Untagged)


class TreeReader:
    """Turns PyYAML's node tree of one source into entries, collecting problems instead of stopping at the first."""

    def __init__(self, source: str, *, keep_lines: bool = True) -> None:
        self.source = source
        self.keep_lines = keep_lines
        self.problems: list[Problem] = []
        self.num_nodes = 0
        self.above: set[int] = set()

    def read(self, text: str) -> Entry:
        """Parse `text`; raises ConfigError for text that is not YAML."""
        try:
            node = _compose(text)
        except RecursionError as error:
            raise self.refuse("nested too deeply", None) from error
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            origin = Origin(self.source, mark.line + 1) if mark and self.keep_lines else Origin(self.source)
            reason = str(getattr(error, "problem", None) or error)
            remedy = "check the indentation, colons and quotes there and on the line before"
            if "expected <block end>" in reason:
                reason = "it is indented otherwise than the lines that it belongs to"
                remedy = "give the keys of one section the same number of spaces, here and on the line before"
            elif "mapping values are not allowed" in reason:
                reason = "a colon if no key can be"
                remedy = "indent the line as its neighbors are, or put the text before the colon in quotes"
            elif reason.startswith(_TAG):
                remedy = "remove it; quotes make a text of anything"
            elif "character '\\t'" in reason:
                reason, remedy = "it is indented with a tab", "use spaces"
            if mark and (line := line_without_colon(text, mark.line)) is not None:
                origin = Origin(self.source, line) if self.keep_lines else origin
                reason, remedy = "no `: ` between key and value", "write `key: value`"
            raise ConfigError([Problem("", f"not valid YAML ({reason})", remedy, origin=origin)]) from error
        if node is None:
            return Entry({}, self.origin(None))
        return self.convert(node, "", self.origin(None))

    def origin(self, node: yaml.Node | None) -> Origin:
        """Place of a node: its line counted from 1, or only the source for overrides."""
        if not self.keep_lines:
            return Origin(self.source)
        return Origin(self.source, node.start_mark.line + 1 if node is not None else 1)

    def convert(self, node: yaml.Node, key: str, origin: Origin) -> Entry:
        """Convert a node, whose key was written at `origin`, and all below it; aliases are expanded.

        Raises ConfigError beyond MAX_NODES or MAX_DEPTH and for an alias inside of what it names.
        """
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise self.refuse(f"more than {MAX_NODES:,} values with all aliases written out", node)
        if id(node) in self.above:
            raise self.refuse("an alias names a value that holds it", node)
        if len(self.above) > MAX_DEPTH:
            raise self.refuse("nested too deeply", node)
        if isinstance(node, yaml.CollectionNode):
            self.above.add(id(node))
            found: dict[str, Entry] | list[Entry]
            if isinstance(node, yaml.MappingNode):
                found = self.convert_mapping(node, key)
            else:
                items = enumerate(node.value)
                found = [self.convert(item, f"{key}.{index}", self.origin(item)) for index, item in items]
            self.above.remove(id(node))
            return Entry(found, origin)
        assert isinstance(node, yaml.ScalarNode), f"unexpected YAML node {node!r}"
        # A quoted scalar is text whatever it looks like.
        return Entry(node.value if node.style else parse_scalar(node.value), origin)

    def refuse(self, rule: str, node: yaml.Node | None) -> ConfigError:
        """Build the error of a text that is YAML and no configuration; the caller raises it."""
        return ConfigError([Problem("", rule, "write it out, shorter and flatter", origin=self.origin(node))])

    def convert_mapping(self, node: yaml.MappingNode, parent: str) -> dict[str, Entry]:
        """Convert a mapping; a key that occurs twice is a problem, because YAML readers keep the last silently."""
        mapping: dict[str, Entry] = {}
        for key_node, value_node in node.value:
            origin = self.origin(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                rule = "a key must be a word, not a list or mapping"
                self.problems.append(Problem(parent, rule, "write `key: value`", origin=origin))
                continue
            name = str(key_node.value)
            key = f"{parent}.{name}" if parent else name
            if name in mapping:
                rule = f"the key occurs twice (first on line {mapping[name].origin.line})"
                self.problems.append(Problem(key, rule, "keep one of the two", origin=origin))
                continue
            mapping[name] = self.convert(value_node, key, origin)
        return mapping


def line_without_colon(text: str, wrong: int) -> int | None:
    """Number of the line before line `wrong` (from 0) that has text, counted from 1, where it is a key that lacks its colon.

    A parser takes such a line for the beginning of a longer text, and complains about the line after it.
    """
    before = [(number, line.partition(" #")[0]) for number, line in enumerate(text.splitlines()[:wrong], 1)]
    number, line = next(((n, line) for n, line in reversed(before) if line.strip()[:1] not in ("", "#")), (0, ""))
    return number if _COLONLESS.match(line) else None


def merge(below: Entry, above: Entry) -> Entry:
    """Lay `above` over `below`: mappings merge key by key, everything else (lists too) replaces.

    Neither is changed. A merged mapping has the place of the upper one, its entries keep their own.
    """
    if not (isinstance(below.value, dict) and isinstance(above.value, dict)):
        return above
    merged = dict(below.value)
    for key, entry in above.value.items():
        merged[key] = merge(merged[key], entry) if key in merged else entry
    return Entry(merged, above.origin)


def no_file(path: Path) -> str:
    """Report what a path is that is not a regular file."""
    return "is a folder" if path.is_dir() else "is not a regular file" if path.exists() else "does not exist"


def use_names_of_today(tree: Entry, problems: list[Problem]) -> None:
    """Put the present names of settings for those of before, in place; one that has both is a problem."""
    if isinstance(tree.value, dict):
        try:
            use_current_names(
                tree.value,
                mapped=lambda entry: (
                    entry.value if isinstance(entry, Entry) and isinstance(entry.value, dict) else None
                ),
            )
        except ValueError as error:
            problems.append(Problem("", str(error), "keep one of the two", origin=tree.origin))


def read_tree(path: Path, problems: list[Problem], *, chain: tuple[Path, ...] = ()) -> Entry:
    """Read the tree of a file with everything it extends below it.

    `extends: other.yaml` is relative to the file that says it and may itself extend; a cycle is rejected. Problems
    that still allow reading on are appended to `problems`. Raises FileNotFoundError and ConfigError.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} {no_file(path)}; name an existing YAML file")
    reader = TreeReader(str(path))
    try:
        text = read_bounded(path, MAX_BYTES).decode()
    except UnicodeDecodeError as error:
        rule = f"not UTF-8 text (byte {error.start})"
        raise ConfigError([Problem("", rule, "save the file as UTF-8", origin=Origin(str(path)))]) from error
    entry = reader.read(text)
    problems += reader.problems
    if not isinstance(entry.value, dict):
        rule = "a configuration is a mapping of sections"
        raise ConfigError([Problem("", rule, "start with `run:`, `model:`, `data:`, ...", origin=entry.origin)])
    use_names_of_today(entry, problems)
    extends = entry.value.pop("extends", None)
    if extends is None:
        return entry
    if not isinstance(extends.value, str):
        rule = "must be the path of one YAML file"
        shown = str(extends.plain())
        raise ConfigError([Problem("extends", rule, "write `extends: other.yaml`", shown, extends.origin)])
    chain = (*chain, path.resolve())
    if "\0" in extends.value:
        rule = "must be the path of one YAML file, without a NUL"
        raise ConfigError([Problem("extends", rule, "write `extends: other.yaml`", extends.value, extends.origin)])
    parent = path.parent / extends.value
    if parent.resolve() in chain:
        names = " -> ".join(item.name for item in (*chain, parent))
        remedy = "remove one `extends` of the circle"
        raise ConfigError([Problem("extends", f"circular `extends`: {names}", remedy, extends.value, extends.origin)])
    if not parent.is_file():
        rule = f"{parent} {no_file(parent)}"
        remedy = "name a file relative to the one that extends it"
        raise ConfigError([Problem("extends", rule, remedy, extends.value, extends.origin)])
    return merge(read_tree(parent, problems, chain=chain), entry)
