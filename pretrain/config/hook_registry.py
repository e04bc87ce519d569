"""Hooks of installed packages: code that looks at a run's masters between steps, with a section of options each.

A package registers a hook with an entry point of the group `amfm.hooks` that names a `HookSpec`, and its options become the
section `hooks.NAME`. As with mixers, a spec names the class by its import path, because configurations are read where torch
is not imported. Hooks are given three things, which is all that the methods tried so far needed: the step, as `set_step` gives it to
modules, the masters (`MasterView`), and nothing to save: what a hook does after a step is a function of the two.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from amfm.model.config.plugins import describe_entry, installed_specs
from amfm.model.config.section import Section

ENTRY_POINTS = "amfm.hooks"


class HookOptions(Section):
    """The base of a hook's options."""

    def broken_rules(self, config: Any, steps: int) -> Iterator[tuple[str, str, str]]:
        """Fields that do not go with a RunConfig of so many steps: each with the rule and a remedy."""
        yield from ()


@dataclass(frozen=True)
class HookSpec:
    """A registered hook as configurations see it, without importing it.

    name: lower case. hook: `package.module:Class`, an `amfm.pretrain.hooks.plugins.TrainHook`. options: its section, whose class docstring and
    field descriptions become the documentation.
    """

    name: str
    hook: str
    options: type[HookOptions]

    def load(self) -> type[Any]:
        """Import the class."""
        module, _, name = self.hook.partition(":")
        found: type[Any] = getattr(importlib.import_module(module), name)
        return found


@cache
def hook_specs() -> dict[str, HookSpec]:
    """Collect the hooks of installed packages by name. Raises RuntimeError as mixers do, and for a name that is taken."""
    specs: dict[str, HookSpec] = {}
    for entry, spec in installed_specs(ENTRY_POINTS, HookSpec):
        if spec.name in specs:
            raise RuntimeError(
                f"{describe_entry(entry)} registers a hook {spec.name!r}, which there is already; uninstall one"
            )
        specs[spec.name] = spec
    return specs
