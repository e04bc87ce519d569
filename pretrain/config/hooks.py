"""The section `hooks`: a field for each hook of an installed package, so that files, overrides and the schema know them."""

from __future__ import annotations

from typing import Any

from pydantic import Field, create_model

from model.config.section import Section
from pretrain.config.hook_registry import hook_specs


class HooksConfig(Section):
    """Hooks of installed packages, by name (entry point group `amfm.hooks`); those without a section do nothing."""


_HOOK_FIELDS: dict[str, Any] = {
    spec.name: (spec.options | None, Field(None, description="None: it does nothing."))
    for spec in hook_specs().values()
}
RegisteredHooks: type[HooksConfig] = create_model(
    "RegisteredHooks", __base__=HooksConfig, __module__=__name__, **_HOOK_FIELDS
)
RegisteredHooks.__doc__ = HooksConfig.__doc__
