"""Learning-rate schedules of installed packages: what `schedule.kind` may name besides ours, and the section of their options.

A package registers one with an entry point of the group `amfm.schedules` that names a `ScheduleSpec`. As with mixers and hooks
the spec names code by its import path, because configurations are read if nothing else of the package is needed.

The code is a function `factor(step, total_steps, schedule, options) -> float`: the share of the peak rate at step number `step`
of `total_steps`, counted from 1, after the warm-up, which is ours. `schedule` is the ScheduleConfig (min_ratio, warmup_length).
It must be a pure function of its arguments: a run that resumes asks it again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from amfm.model.config.plugins import (
    PluginSections,
    list_packages,
    load_named,
    specs_by_name,
    until_registered,
    with_sections,
)
from amfm.model.config.section import Section

ENTRY_POINTS = "amfm.schedules"
OURS = ("wsd", "cosine", "constant", "inverse_sqrt")


@dataclass(frozen=True)
class ScheduleSpec:
    """A schedule as configurations see it, without importing it.

    name: lower case, a value of `schedule.kind`. factor: `package.module:function`. options: its section, whose fields have
    defaults.
    """

    group: ClassVar[str] = ENTRY_POINTS

    name: str
    factor: str | Callable[..., Any]
    options: type[Section]

    def load(self) -> Callable[..., float]:
        """Import the function."""
        found: Callable[..., float] = load_named(self.factor)
        return found


@until_registered
@cache
def schedule_specs() -> dict[str, ScheduleSpec]:
    """Collect the schedules of installed packages by name. Raises RuntimeError as mixers do, and for a name that is taken."""
    return specs_by_name(ENTRY_POINTS, ScheduleSpec, OURS, "a schedule")


@with_sections({name: (spec.options, "None: its defaults.") for name, spec in schedule_specs().items()})
class RegisteredSchedules(PluginSections):
    """Options of schedules of installed packages, by name; `kind` chooses one (entry point group `amfm.schedules`)."""

    group: ClassVar[str] = ENTRY_POINTS
    packages: ClassVar[Mapping[str, str]] = list_packages(ENTRY_POINTS, ScheduleSpec)
