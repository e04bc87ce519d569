"""Checks of the optimizer's kind: settings that it would not read, and what it does not go with."""

from __future__ import annotations

from collections.abc import Iterator

from pretrain.config.errors import Problem
from pretrain.config.schema import RunConfig


def optimizer_problems(config: RunConfig) -> Iterator[Problem]:
    """Refuse Muon's settings beside another kind, and Muon in the memory of the host."""
    section = config.optimizer
    if section.muon is not None and section.kind != "muon":
        rule = f"has settings of Muon, and optimizer.kind is {section.kind}"
        yield Problem("optimizer.muon", rule, "use optimizer.kind=muon, or remove the section")
    if section.kind == "muon" and config.parallel.offload_optimizer:
        rule = "would have the host's processors multiply Muon's matrices"
        yield Problem("parallel.offload_optimizer", rule, "use false, or optimizer.kind=adamw", "true")
