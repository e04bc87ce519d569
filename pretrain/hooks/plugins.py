"""Hooks of installed packages in a run: after each step they may look at the masters and edit them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from amfm.pretrain.checkpoint.masters import MasterView
from amfm.pretrain.checkpoint.save import ranks_of
from amfm.pretrain.config.hook_registry import hook_specs
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.run import Run


class TrainHook(Protocol):
    """Built as `Class(options, config)` on every rank, at every start of a run: there is nothing that a checkpoint keeps."""

    def after_step(self, step: int, total_steps: int, open_view: Callable[[], MasterView]) -> dict[str, Any] | None:
        """Do what is due after `step` of `total_steps`; every rank calls it. Returns what to write to events.jsonl, None: nothing.

        What it does must follow from the step and the masters, alike on all ranks. `open_view` is for steps that need the
        masters alone: it walks through all of them.
        """


def build_hooks(config: RunConfig) -> dict[str, TrainHook]:
    """Build the hooks whose sections are there, by name."""
    given = {name: getattr(config.hooks, name) for name in hook_specs()}
    return {name: hook_specs()[name].load()(options, config) for name, options in given.items() if options is not None}


def call_hooks(run: Run, hooks: dict[str, TrainHook]) -> None:
    """Call every hook after a step. Every rank must call this."""

    def open_view() -> MasterView:
        return MasterView(run.saver.layout, run.saver.writers, ranks_of(run.engine).rank)

    for name, hook in hooks.items():
        found = hook.after_step(run.progress.step, run.num_steps, open_view)
        if found is None:
            continue
        # What was edited is no silent corruption.
        run.note_edit()
        run.record_event("hook", name=name, **found)
        run.say(f"step {run.progress.step}: {name}: " + ", ".join(f"{key} {value}" for key, value in found.items()))
