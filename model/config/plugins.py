"""What installed packages register: specs under the names of their entry points' groups.

Specs come from installed packages alone and never from a module named in a configuration file: reading a file runs no code
that was not installed on purpose.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol, TypeVar

from model.config.pattern import MIXER_NAME


class Spec(Protocol):
    """What an entry point names: it says what it is called in a configuration."""

    @property
    def name(self) -> str:
        """Lower case."""


S = TypeVar("S", bound=Spec)


def installed_specs(group: str, kind: type[S]) -> Iterator[tuple[EntryPoint, S]]:
    """Import the specs that installed packages register in a group, with their entry points.

    Raises RuntimeError for one that cannot be imported or is of another kind: the installation is at fault, not a setting.
    """
    for entry in entry_points(group=group):
        try:
            spec = entry.load()
        except (ImportError, AttributeError) as error:
            raise RuntimeError(
                f"{describe_entry(entry)} cannot be loaded ({error}); mend or uninstall its package"
            ) from error
        if not isinstance(spec, kind) or not MIXER_NAME.fullmatch(spec.name):
            raise RuntimeError(
                f"{describe_entry(entry)} is {spec!r}; it must be a {kind.__name__} with a lower-case name: mend its package"
            )
        yield entry, spec


def describe_entry(entry: EntryPoint) -> str:
    """Describe an entry point and its package, for messages."""
    package = entry.dist.name if entry.dist is not None else "an unknown package"
    return f"the entry point {entry.name} = {entry.value} of {package} (group {entry.group})"
