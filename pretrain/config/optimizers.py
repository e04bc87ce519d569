"""Optimizers of installed packages: what `optimizer.kind` may name besides ours, and the section of their options.

A package registers one with an entry point of the group `amfm.optimizers` that names an `OptimizerSpec`. As with schedules the
spec names code by its import path, because configurations are read where nothing else of the package is needed.

The code is a function `update(weight, gradient, moments, step, group, options)` that changes `weight` and the tensors in
`moments` in place. All are float32 vectors of the same length: ZeRO flattens and cuts them anywhere, so the rule must be one of
single numbers, as AdamW's is. `step` counts from 1; `group` has `lr`, `betas`, `eps` and `weight_decay` (0 for what does not
decay). It must depend on nothing else: a run that resumes has only these.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

from pydantic import Field, create_model

from amfm.model.config.plugins import PluginSections, describe_entry, installed_specs, list_packages
from amfm.model.config.section import Section

ENTRY_POINTS = "amfm.optimizers"
OURS = ("adamw", "muon")


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer as configurations see it, without importing it.

    name: lower case, a value of `optimizer.kind`. update: `package.module:function`. num_moments: tensors that it keeps for each
    weight: `momentum` for one, `exp_avg` and `exp_avg_sq` for two. options: its section, whose fields have defaults.
    """

    name: str
    update: str
    num_moments: Literal[1, 2]
    options: type[Section]

    def load(self) -> Callable[..., None]:
        """Import the function."""
        module, _, name = self.update.partition(":")
        found: Callable[..., None] = getattr(importlib.import_module(module), name)
        return found


@cache
def optimizer_specs() -> dict[str, OptimizerSpec]:
    """Collect the optimizers of installed packages by name. Raises RuntimeError as mixers do, and for a name that is taken."""
    specs: dict[str, OptimizerSpec] = {}
    for entry, spec in installed_specs(ENTRY_POINTS, OptimizerSpec):
        if spec.name in {*specs, *OURS}:
            raise RuntimeError(
                f"{describe_entry(entry)} registers an optimizer {spec.name!r}, which there is already; uninstall one"
            )
        specs[spec.name] = spec
    return specs


class OptimizersConfig(PluginSections):
    """Options of optimizers of installed packages, by name; `kind` chooses one (entry point group `amfm.optimizers`)."""

    group: ClassVar[str] = ENTRY_POINTS
    packages: ClassVar[Mapping[str, str]] = list_packages(ENTRY_POINTS, OptimizerSpec)


_FIELDS: dict[str, Any] = {
    spec.name: (spec.options | None, Field(None, description="None: its defaults."))
    for spec in optimizer_specs().values()
}
RegisteredOptimizers: type[OptimizersConfig] = create_model(
    "RegisteredOptimizers", __base__=OptimizersConfig, __module__=__name__, **_FIELDS
)
RegisteredOptimizers.__doc__ = OptimizersConfig.__doc__
