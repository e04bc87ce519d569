"""Learning-rate schedules of installed packages: what `schedule.kind` may name besides ours, and the section of their options.

A package registers one with an entry point of the group `amfm.schedules` that names a `ScheduleSpec`. As with mixers and hooks
the spec names code by its import path, because configurations are read where nothing else of the package is needed.

The code is a function `factor(step, total_steps, schedule, options) -> float`: the share of the peak rate at step number `step`
of `total_steps`, counted from 1, after the warm-up, which is ours. `schedule` is the ScheduleConfig (min_ratio, warmup_length).
It must be a pure function of its arguments: a run that resumes asks it again.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from pydantic import Field, create_model

from amfm.model.config.plugins import PluginSections, describe_entry, installed_specs, list_packages
from amfm.model.config.section import Section

ENTRY_POINTS = "amfm.schedules"
OURS = ("wsd", "cosine", "constant", "inverse_sqrt")


@dataclass(frozen=True)
class ScheduleSpec:
    """A schedule as configurations see it, without importing it.

    name: lower case, a value of `schedule.kind`. factor: `package.module:function`. options: its section, whose fields have
    defaults.
    """

    name: str
    factor: str
    options: type[Section]

    def load(self) -> Callable[..., float]:
        """Import the function."""
        module, _, name = self.factor.partition(":")
        found: Callable[..., float] = getattr(importlib.import_module(module), name)
        return found


@cache
def schedule_specs() -> dict[str, ScheduleSpec]:
    """Collect the schedules of installed packages by name. Raises RuntimeError as mixers do, and for a name that is taken."""
    specs: dict[str, ScheduleSpec] = {}
    for entry, spec in installed_specs(ENTRY_POINTS, ScheduleSpec):
        if spec.name in {*specs, *OURS}:
            raise RuntimeError(
                f"{describe_entry(entry)} registers a schedule {spec.name!r}, which there is already; uninstall one"
            )
        specs[spec.name] = spec
    return specs


class SchedulesConfig(PluginSections):
    """Options of schedules of installed packages, by name; `kind` chooses one (entry point group `amfm.schedules`)."""

    group: ClassVar[str] = ENTRY_POINTS
    packages: ClassVar[Mapping[str, str]] = list_packages(ENTRY_POINTS, ScheduleSpec)


_FIELDS: dict[str, Any] = {
    spec.name: (spec.options | None, Field(None, description="None: its defaults."))
    for spec in schedule_specs().values()
}
RegisteredSchedules: type[SchedulesConfig] = create_model(
    "RegisteredSchedules", __base__=SchedulesConfig, __module__=__name__, **_FIELDS
)
RegisteredSchedules.__doc__ = SchedulesConfig.__doc__
