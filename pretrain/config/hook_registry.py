"""Hooks as configurations see them: the table of those that a section asks for, ours and those of installed packages.

A package registers a hook with an entry point of the group `amfm.hooks` that names a `HookSpec`, and its options become
the section `hooks.NAME`. Ours, such as `prune`, `distill` and `ema`, have their own sections. As with mixers, a spec names the class
by its import path, because configurations are read where torch is not imported.

A hook is a subclass of `amfm.pretrain.hook.Hook`, built as `Class(options, run)` on every rank at every start. Nothing
of it is saved: what it does is a function of the step and the master weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from amfm.model.config.plugins import list_packages, load_named, specs_by_name, until_registered
from amfm.model.config.section import Section
from amfm.pretrain.config.hook_sections import (
    DistillConfig,
    EmaConfig,
    ForgetConfig,
    PruneConfig,
    QkClipConfig,
    TraceConfig,
)

ENTRY_POINTS = "amfm.hooks"


class HookOptions(Section):
    """The base of a hook's options."""

    def broken_rules(self, config: Any, steps: int) -> Iterator[tuple[str, str, str]]:
        """Fields that do not go with a RunConfig of this many steps: each with the rule and a fix."""
        yield from ()


INTERFACE = 2
# What a package has to do for each interface, since the one before.
CHANGES = {
    2: "a hook is a subclass of amfm.pretrain.hook.Hook, built as Class(options, run) and no longer as "
    "Class(options, config); "
    "its after_step(result) opens the master weights by run.open_masters(), calls run.note_edit() after an edit, and "
    "records by run.tell()",
}


@dataclass(frozen=True)
class HookSpec:
    """A hook as configurations see it, without importing it.

    name: lower case. hook: `package.module:Class`, an `amfm.pretrain.hook.Hook`. options: its section, whose class
    docstring and field descriptions become the documentation. interface: the one that the class is written for, at
    present 2.
    """

    group: ClassVar[str] = ENTRY_POINTS

    name: str
    hook: str | Callable[..., Any]
    options: type[Section]
    interface: int = 1

    def load(self) -> type[Any]:
        """Import the class."""
        found: type[Any] = load_named(self.hook)
        return found

    def explain_unfit(self) -> str | None:
        """Why this program cannot call the hook, and what to do; None if it can."""
        if self.interface == INTERFACE:
            return None
        written = f"is written for interface {self.interface} of hooks, and this amfm has {INTERFACE}"
        if self.interface > INTERFACE:
            return f"{written}; install a newer amfm"
        changes = "; ".join(CHANGES[number] for number in range(self.interface + 1, INTERFACE + 1))
        return f"{written}: {changes}. Install a newer version of the package"


# In the order in which they edit the master weights; sections of a RunConfig under their names.
BUILT_IN = (
    HookSpec("prune", "amfm.pretrain.hooks.prune:Prune", PruneConfig, INTERFACE),
    HookSpec("forget", "amfm.pretrain.hooks.prune:Forget", ForgetConfig, INTERFACE),
    HookSpec("qk_clip", "amfm.pretrain.hooks.qk_clip:QkClip", QkClipConfig, INTERFACE),
    HookSpec("distill", "amfm.pretrain.hooks.distill:Distill", DistillConfig, INTERFACE),
    HookSpec("trace_choices", "amfm.pretrain.hooks.trace_choices:TraceChoices", TraceConfig, INTERFACE),
    HookSpec("ema", "amfm.pretrain.hooks.weight_averages:Ema", EmaConfig, INTERFACE),
)


@until_registered
@cache
def hook_specs() -> dict[str, HookSpec]:
    """Collect the hooks of installed packages by name.

    Raises RuntimeError as mixers do, for a name that is taken, and for an interface that this program does not have.
    """
    specs = specs_by_name(ENTRY_POINTS, HookSpec, [own.name for own in BUILT_IN], "a hook")
    for spec in specs.values():
        unfit = spec.explain_unfit()
        if unfit is not None:
            raise RuntimeError(f"the hook {spec.name!r} of {list_packages(ENTRY_POINTS, HookSpec)[spec.name]} {unfit}")
    return specs
