"""Configurations that were saved with a checkpoint: read where other packages may be installed than where they were written."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from amfm.model.config import routers
from amfm.model.config.old_names import use_current_names
from amfm.model.config.plugins import list_packages, read_saved_sections
from amfm.model.config.schema import read_saved_model
from amfm.model.huggingface.hf_class import ENTRY_POINTS as TARGETS
from amfm.model.huggingface.hf_class import OURS as OWN_TARGETS
from amfm.model.huggingface.hf_class import PACKAGED, HfTarget
from amfm.pretrain.config.hooks import RegisteredHooks
from amfm.pretrain.config.optimizers import (
    OPTIMIZERS,
    OWN_OPTIMIZERS,
    OWN_SCHEDULES,
    SCHEDULES,
    RegisteredOptimizers,
    RegisteredSchedules,
    optimizer_specs,
    schedule_specs,
)
from amfm.pretrain.config.schema import RunConfig


def packages_used(config: RunConfig) -> dict[str, str]:
    """Name and version of the package behind each mixer, router, hook, schedule, optimizer and export target that is used, by its dotted key."""
    found = {
        key: RegisteredSchedules.packages[kind]
        for key, kind in schedule_kinds(config)
        if kind in RegisteredSchedules.packages
    }
    if config.optimizer.kind in RegisteredOptimizers.packages:
        found["optimizer.kind"] = RegisteredOptimizers.packages[config.optimizer.kind]
    if config.export.target in PACKAGED:
        found["export.target"] = list_packages(TARGETS, HfTarget)[config.export.target]
    found |= config.model.packages_used()
    return found | {f"hooks.{name}": package for name, package in config.hooks.packages_used().items()}


def schedule_kinds(config: RunConfig) -> Iterator[tuple[str, str]]:
    """The schedules of a run, by dotted key."""
    yield "schedule.kind", config.schedule.kind
    for index, stage in enumerate(config.stages):
        if stage.schedule is not None:
            yield f"stages.{index}.schedule.kind", stage.schedule.kind


def check_schedule(section: Any, packages: Mapping[str, str]) -> None:
    """Raise ValueError if a run's or stage's schedule is one that nothing here registers, naming the package that did."""
    known = (*OWN_SCHEDULES, *schedule_specs())
    check_choice(section, "schedule.kind", known, SCHEDULES, packages)


def check_choice(section: Any, key: str, known: Sequence[str], group: str, packages: Mapping[str, str]) -> None:
    """Raise ValueError if a saved choice is one that nothing here registers, naming the package that did."""
    name, _, field = key.partition(".")
    saved = section.get(name) if isinstance(section, Mapping) else None
    choice = saved.get(field, known[0]) if isinstance(saved, Mapping) else known[0]
    if choice not in known:
        named = [package for used, package in packages.items() if used.endswith(key)]
        raise ValueError(
            f"the saved {name if field == 'kind' else key} {choice} is of {named[0] if named else 'a package whose name was not saved'}, which is not "
            f"installed here (nothing registers it under the entry point group {group}); install it"
        )


def read_saved_config(manifest: Mapping[str, Any]) -> RunConfig:
    """Read the configuration of a checkpoint's manifest; fields that are newer than it have their defaults.

    A mixer's or hook's section that nothing here registers is left out where it is null, as programs before wrote it for
    every package that was installed. Raises ValueError for one with values, naming its package, and pydantic's
    ValidationError for what this program does not understand.
    """
    saved, packages = copy.deepcopy(dict(manifest["config"])), manifest.get("packages", {})
    use_current_names(saved)
    saved["model"] = read_saved_model(saved.get("model"), packages)
    check_choice(saved["model"], "moe.router", (*routers.OURS, *routers.router_specs()), routers.ENTRY_POINTS, packages)
    for section in (saved, *(saved.get("stages") or ())):
        check_schedule(section, packages)
    check_choice(saved, "optimizer.kind", (*OWN_OPTIMIZERS, *optimizer_specs()), OPTIMIZERS, packages)
    check_choice(saved, "export.target", ("auto", *OWN_TARGETS, *PACKAGED), TARGETS, packages)
    if "hooks" in saved:
        saved["hooks"] = read_saved_sections(saved["hooks"], RegisteredHooks, "hooks", packages)
    return RunConfig.model_validate(saved)
