"""Tokenizers of installed packages: a file whose suffix a package registers is read by its class.

A package registers one with an entry point of the group `amfm.tokenizers`: its name is the suffix of the files, and it names a
class that is built from the content of one and has what `Tokenizer` (tokenizer.py) asks for. `kind` is the suffix, and a store
has the file as `tokenizer.SUFFIX`. Preparation sends the class to its actors, so its instances must pickle. With
`to_tokenizer_json() -> bytes` it can be exported: a tokenizer.json of the same ids.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

ENTRY_POINTS = "amfm.tokenizers"
OURS = ("model", "json")


@cache
def tokenizer_entries() -> dict[str, EntryPoint]:
    """Entry points by suffix. Raises RuntimeError for one that is registered twice or is ours."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name in {*found, *OURS}:
            raise RuntimeError(
                f"{describe_entry(entry)} registers a suffix that is taken; uninstall one of the packages, or rename it"
            )
        found[entry.name] = entry
    return found


def read_registered(suffix: str, content: bytes) -> Any:
    """Build a package's tokenizer, a `Tokenizer`, from the content of a file. Raises RuntimeError where its package is broken."""
    entry = tokenizer_entries()[suffix]
    try:
        build: Callable[[bytes], Any] = entry.load()
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"{describe_entry(entry)} cannot be loaded ({error}); fix or uninstall its package"
        ) from error
    tokenizer = build(content)
    if (tokenizer.kind, tokenizer.file_name) != (suffix, f"tokenizer.{suffix}"):
        raise RuntimeError(
            f"{describe_entry(entry)}: its kind is {tokenizer.kind!r} and its file {tokenizer.file_name!r}; they must be "
            f"{suffix!r} and 'tokenizer.{suffix}': fix its package"
        )
    return tokenizer


def describe_entry(entry: EntryPoint) -> str:
    """Describe an entry point and its package, for messages."""
    package = entry.dist.name if entry.dist is not None else "an unknown package"
    return f"the entry point {entry.name} = {entry.value} of {package} (group {entry.group})"
