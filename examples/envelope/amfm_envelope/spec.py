"""What configurations know of the envelope; read without torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, cast

from pydantic import Field

from amfm.pretrain.config.hook_registry import HookOptions, HookSpec
from amfm.pretrain.config.hook_sections import PruneConfig, PrunedGroups

if TYPE_CHECKING:
    from amfm.pretrain.config.schema import RunConfig


class EnvelopeOptions(HookOptions):
    """A penalty of group norms that leaves about this many groups of each block, and a choice at its end; after WGSEF."""

    groups: PrunedGroups | Literal["heads and channels"] = Field(
        "channels", description="As `prune.groups`, or both kinds, which then share one budget."
    )
    budget: Literal["groups", "weights"] = Field(
        "groups",
        description="What `keep` is a share of: the groups of each block, or the weights of all groups of the model, so that a group costs its number of weights.",
    )
    keep: float = Field(gt=0, lt=1, description="Share of the budget that is left in the end.")
    strength: float = Field(1.0, gt=0, description="Of the penalty when it is fully on; near 0 it chooses nothing.")
    start_step: int = Field(
        gt=0, description="Step after which the penalty begins to rise, in proportion to the steps."
    )
    every_steps: int = Field(1, gt=0, description="Steps from one shrinking of groups to the next.")
    end_step: int = Field(
        gt=0, description="Step after which all but the largest groups go to zero, and the penalty ends."
    )

    def kinds(self) -> tuple[PrunedGroups, ...]:
        """The kinds of group."""
        return cast("tuple[PrunedGroups, ...]", tuple(self.groups.split(" and ")))

    def broken_rules(self, config: RunConfig, steps: int) -> Iterator[tuple[str, str, str]]:
        """Steps in order, no other pruning, and the rules of groups that `prune` has."""
        if self.start_step >= self.end_step:
            yield "start_step", f"must be less than end_step={self.end_step}", "lower it"
        if self.end_step > steps:
            yield "end_step", f"is beyond the {steps} steps of the run", "lower it"
        if config.prune is not None:
            yield (
                "groups",
                "does not go with the section prune, which sets groups to zero as well",
                "remove one of them",
            )
        if self.groups == "experts":
            yield (
                "groups",
                "does not change the router's bias, so it would still choose what is zero",
                "use prune for experts",
            )
        if self.groups == "heads and channels" and self.budget == "groups":
            yield "groups", "compares groups of two sizes, which a budget of groups counts alike", "use budget: weights"
        # Imported late: checks read this section.
        from amfm.pretrain.checks.sections import group_problems

        for kind in self.kinds():
            as_prune = PruneConfig(groups=kind, keep=self.keep, start_step=1, every_steps=1, end_step=2)
            for problem in group_problems(config, as_prune):
                # A budget of weights need not be a whole number of groups.
                if self.budget == "groups" or problem.key != "prune.keep":
                    yield problem.key.removeprefix("prune."), problem.rule, problem.remedy


SPEC = HookSpec("envelope", "amfm_envelope.hook:EnvelopeHook", EnvelopeOptions, interface=2)
