"""Optimizers of installed packages: what `optimizer.kind` may name besides ours, and the section of their options.

A package registers one with an entry point of the group `amfm.optimizers` that names an `OptimizerSpec`. As with schedules the
spec names code by its import path, because configurations are read where nothing else of the package is needed.

The code is a function `update(weight, gradient, moments, step, group, options)` that changes `weight` and the tensors in
`moments` in place. All are float32 vectors of the same length: ZeRO flattens and cuts them anywhere, so the rule must be one of
single numbers, as AdamW's is. `step` counts from 1; `group` has `lr`, `betas`, `eps` and `weight_decay` (0 for what does not
decay). It must depend on nothing else: a run that resumes has only these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

from amfm.model.config.plugins import PluginSections, list_packages, load_named, specs_by_name, with_sections
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
        found: Callable[..., None] = load_named(self.update)
        return found


@cache
def optimizer_specs() -> dict[str, OptimizerSpec]:
    """Collect the optimizers of installed packages by name. Raises RuntimeError as mixers do, and for a name that is taken."""
    return specs_by_name(ENTRY_POINTS, OptimizerSpec, OURS, "an optimizer")


@with_sections({name: (spec.options, "None: its defaults.") for name, spec in optimizer_specs().items()})
class RegisteredOptimizers(PluginSections):
    """Options of optimizers of installed packages, by name; `kind` chooses one (entry point group `amfm.optimizers`)."""

    group: ClassVar[str] = ENTRY_POINTS
    packages: ClassVar[Mapping[str, str]] = list_packages(ENTRY_POINTS, OptimizerSpec)
