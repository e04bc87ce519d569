"""The section `hooks`: a field per hook of an installed package, so that files, overrides and the schema know them.

Not in hook_registry.py: a package of several kinds of parts imports that while its first part is read, and this reads all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from amfm.model.config.plugins import PluginSections, list_packages, with_sections
from amfm.pretrain.config.hook_registry import ENTRY_POINTS, HookSpec, hook_specs


@with_sections({name: (spec.options, "None: it does nothing.") for name, spec in hook_specs().items()})
class RegisteredHooks(PluginSections):
    """Hooks of installed packages, by name (entry point group `amfm.hooks`); those without a section do nothing."""

    group: ClassVar[str] = ENTRY_POINTS
    packages: ClassVar[Mapping[str, str]] = list_packages(ENTRY_POINTS, HookSpec)
