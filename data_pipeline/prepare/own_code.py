"""Filters, transforms and readers of packages, folders and processes, by the names that a source or a file's suffix gives.

A package registers them with entry points of the group `amfm.documents`; a folder of `plugins` and a process by `amfm.register`.
What the code is decides the bytes of a store: the digest of the file that a function is in, with the version that its spec
states, is part of the units' keys and of the store's identity.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

ENTRY_POINTS = "amfm.documents"


@dataclass(frozen=True)
class CodeSpec:
    """Code about documents. name: lower case. function: itself, or `package.module:function`. version: of what it uses elsewhere.

    Functions are functions of their arguments: they run once for each document, in any process and order.
    """

    group: ClassVar[str] = ENTRY_POINTS
    registered: ClassVar[dict[str, CodeSpec]] = {}  # in this process and by folders, of all three kinds

    name: str
    function: str | Callable[..., Any]
    version: str = ""

    def load(self) -> Callable[..., Any]:
        """Import the function."""
        if not isinstance(self.function, str):
            return self.function
        module, _, name = self.function.partition(":")
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return found

    def digest(self) -> str:
        """Digest of the version and of the file that the function is in, or of its own lines where there is none."""
        function = self.load()
        file = getattr(sys.modules.get(function.__module__), "__file__", None)
        text = Path(file).read_bytes() if file else inspect.getsource(function).encode()
        return hashlib.blake2b(self.version.encode() + b"\n" + text, digest_size=16).hexdigest()


class DocumentFilter(CodeSpec):
    """`keep(text, record) -> str | None`: why a document is dropped, None for one that stays.

    record: the fields of its JSON line, row or sample; none for a file of text.
    """


class DocumentTransform(CodeSpec):
    """`change(text, record) -> str`: what takes the text's place; blank text is a reject."""


@dataclass(frozen=True)
class FileReader(CodeSpec):
    """`read(stream) -> Iterator[str | dict]`: the documents of a file as texts, or as records with fields.

    stream: binary, decompressed. suffixes: such as `.warc`; none of ours. ValueError is damage; what came before it stays.
    """

    suffixes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """A filter, transform or reader of a source, with the digest of its code."""

    name: str
    is_filter: bool
    function: Callable[..., Any]
    digest: str


@cache
def installed_code() -> dict[str, CodeSpec]:
    """The specs of installed packages by name. Raises RuntimeError for an entry point that is broken."""
    found: dict[str, CodeSpec] = {}
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            spec = entry.load()
        except (ImportError, AttributeError) as error:
            raise RuntimeError(f"the entry point {entry.name} = {entry.value} cannot be loaded ({error})") from error
        if not isinstance(spec, CodeSpec) or spec.name in found:
            raise RuntimeError(
                f"the entry point {entry.name} = {entry.value} (group {ENTRY_POINTS}) is {spec!r}; it must be a DocumentFilter, "
                "DocumentTransform or FileReader with its own name: fix or uninstall its package"
            )
        found[spec.name] = spec
    return found


def all_code() -> dict[str, CodeSpec]:
    """Each spec by name; one of this process takes the place of a package's."""
    return installed_code() | CodeSpec.registered


def find_steps(names: tuple[str, ...], source: str) -> tuple[Step, ...]:
    """The filters and transforms of a source, in order. Raises ValueError for a name that nothing registers."""
    known = all_code() if names else {}
    steps = []
    for name in names:
        spec = known.get(name)
        if not isinstance(spec, DocumentFilter | DocumentTransform):
            there = ", ".join(name for name, each in known.items() if not isinstance(each, FileReader)) or "none"
            raise ValueError(  # noqa: TRY004 - of a setting
                f"source {source!r}: steps has {name!r}, which no filter or transform is called; there is {there}. Name the folder "
                f"that registers it in plugins, or install its package (entry point group {ENTRY_POINTS})"
            )
        steps.append(Step(name, isinstance(spec, DocumentFilter), spec.load(), spec.digest()))
    return tuple(steps)


def find_reader(suffix: str) -> FileReader | None:
    """The reader that registers a suffix."""
    readers = (spec for spec in all_code().values() if isinstance(spec, FileReader))
    return next((spec for spec in readers if suffix in spec.suffixes), None)


def local_modules() -> Iterator[ModuleType]:
    """Packages of functions that other processes cannot import: what a process or a folder registered."""
    for spec in CodeSpec.registered.values():
        module = sys.modules.get(spec.load().__module__.partition(".")[0])
        if module is not None and module.__name__ != "__main__":
            yield module
