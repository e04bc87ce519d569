"""Configurations that were saved with a checkpoint: read where other packages may be installed than where they were written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amfm.model.config.plugins import read_saved_sections
from amfm.model.config.schema import read_saved_model
from amfm.pretrain.config.hooks import RegisteredHooks
from amfm.pretrain.config.schema import RunConfig


def packages_used(config: RunConfig) -> dict[str, str]:
    """Name and version of the package behind each mixer and hook that is set, by the dotted key of its section."""
    found = {f"model.mixers.{name}": package for name, package in config.model.mixers.packages_used().items()}
    return found | {f"hooks.{name}": package for name, package in config.hooks.packages_used().items()}


def read_saved_config(manifest: Mapping[str, Any]) -> RunConfig:
    """Read the configuration of a checkpoint's manifest; fields that are newer than it have their defaults.

    A mixer's or hook's section that nothing here registers is left out where it is null, as programs before wrote it for
    every package that was installed. Raises ValueError for one with values, naming its package, and pydantic's
    ValidationError for what this program does not understand.
    """
    saved, packages = dict(manifest["config"]), manifest.get("packages", {})
    saved["model"] = read_saved_model(saved.get("model"), packages)
    if "hooks" in saved:
        saved["hooks"] = read_saved_sections(saved["hooks"], RegisteredHooks, "hooks", packages)
    return RunConfig.model_validate(saved)
