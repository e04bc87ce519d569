"""Sections about weights that a run edits between steps: pruning and forgetting."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from amfm.model.config.section import Section

PrunedGroups = Literal["channels", "experts", "heads"]
PRUNED_GROUPS: tuple[PrunedGroups, ...] = get_args(PrunedGroups)


class PruneConfig(Section):
    """Magnitude pruning while the model trains: the smallest groups go to zero and stay there; `amfm shrink` takes them out."""

    groups: PrunedGroups = Field(
        description="What goes as a whole: inner `channels` of dense feed-forwards and shared experts, routed `experts`, `heads` of attention (a key-value head with its queries)."
    )
    keep: float = Field(gt=0, lt=1, description="Share of the groups of each block that is left in the end.")
    method: Literal["magnitude"] = Field("magnitude", description="The groups of least norm go.")
    start_step: int = Field(gt=0, description="Step after which the first go.")
    every_steps: int = Field(gt=0, description="Steps from one time to the next.")
    end_step: int = Field(
        gt=0, description="Step after which the last go; between, their number follows a cubic ramp, fast at first."
    )


class ForgetConfig(Section):
    """Active forgetting (Chen et al. 2023, arXiv 2307.01163): the embedding is re-initialised now and then while the rest learns."""

    every_steps: int = Field(gt=0, description="Steps from one new embedding to the next.")
    until_step: int = Field(gt=0, description="Last step after which the embedding is re-initialised; none after it.")
