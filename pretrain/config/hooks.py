"""The section `hooks`: a field per hook of an installed package, so that files, overrides and the schema know them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, create_model

from amfm.model.config.plugins import PluginSections, list_packages
from amfm.pretrain.config.hook_registry import ENTRY_POINTS, HookSpec, hook_specs


class HooksConfig(PluginSections):
    """Hooks of installed packages, by name (entry point group `amfm.hooks`); those without a section do nothing."""

    group: ClassVar[str] = ENTRY_POINTS
    packages: ClassVar[Mapping[str, str]] = list_packages(ENTRY_POINTS, HookSpec)


_HOOK_FIELDS: dict[str, Any] = {
    spec.name: (spec.options | None, Field(None, description="None: it does nothing."))
    for spec in hook_specs().values()
}
RegisteredHooks: type[HooksConfig] = create_model(
    "RegisteredHooks", __base__=HooksConfig, __module__=__name__, **_HOOK_FIELDS
)
RegisteredHooks.__doc__ = HooksConfig.__doc__
