"""Sections of our own hooks: distillation, pruning, forgetting, QK-clip, a moving average of the weights, traces of choices."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from amfm.model.config.section import Section

PrunedGroups = Literal["channels", "experts", "heads"]
PRUNED_GROUPS: tuple[PrunedGroups, ...] = get_args(PrunedGroups)


class PruneConfig(Section):
    """Magnitude pruning while the model trains: the smallest groups are set to zero and stay there; `amfm compact` removes them."""

    groups: PrunedGroups = Field(
        description="Units that are pruned as a whole: inner `channels` of dense feed-forwards and shared experts, routed `experts`, `heads` of attention (a key-value head with its queries)."
    )
    keep: float = Field(gt=0, lt=1, description="Share of the groups of each block that remains at the end.")
    method: Literal["magnitude"] = Field("magnitude", description="The groups with the smallest norm are pruned.")
    start_step: int = Field(gt=0, description="Step after which the first groups are pruned.")
    every_steps: int = Field(gt=0, description="Steps between two prunings.")
    end_step: int = Field(
        gt=0,
        description="Step after which the last groups are pruned; in between, their number follows a cubic ramp, fast at first.",
    )


class ForgetConfig(Section):
    """Active forgetting (Chen et al. 2023, arXiv 2307.01163): the embedding is re-initialized at intervals while the rest trains."""

    every_steps: int = Field(gt=0, description="Steps from one new embedding to the next.")
    until_step: int = Field(gt=0, description="Last step after which the embedding is re-initialized; none after it.")


class EmaConfig(Section):
    """An exponential moving average of the weights, in float32 next to the master weights: 4 bytes more per parameter, cut as they are."""

    decay: float = Field(0.999, ge=0, lt=1, description="Of the average at each update; the rest is the new weight's.")
    every_steps: int = Field(1, gt=0, description="Steps from one update to the next.")
    start: int = Field(0, ge=0, description="Step up to which the average is the weights themselves.")


class TraceConfig(Section):
    """Write which experts each token chose, to `choices/` in the run directory (docs/moe_balance.md)."""

    every_steps: int = Field(1, gt=0, description="Steps from one that is written to the next.")
    max_mebibytes: float = Field(
        1024, gt=0, description="Largest size of all files together; the oldest steps are removed first."
    )


class DistillConfig(Section):
    """Learn a teacher's probabilities of the next token (Hinton et al. 2015, arXiv 1503.02531), in part or in place of the text's."""

    teacher: str = Field(
        min_length=1,
        description="A run, checkpoint or weights folder, or a folder of a transformers class that `amfm import` reads, with this run's tokenizer and vocabulary. Of a run that still trains, name a checkpoint.",
    )
    store: str | None = Field(
        None,
        min_length=1,
        description="Folder with the teacher's likeliest tokens for every sample of the run, which `amfm distill store` writes; null: the teacher reads each micro-batch.",
    )
    weight: float = Field(
        0.5, gt=0, le=1, description="Of the divergence from the teacher; the cross entropy of the text has the rest."
    )
    temperature: float = Field(
        1.0, gt=0, description="Divides the logits of both; the divergence is multiplied by its square."
    )
    top_k: int | None = Field(
        None,
        gt=0,
        description="Compare the teacher's most likely tokens, and the remaining probability of all others as one; null: all tokens.",
    )
    kind: Literal["kl", "reverse_kl"] = Field(
        "kl",
        description="`kl`: expected under the teacher, so that the model covers all of it; `reverse_kl`: under the model.",
    )


class QkClipConfig(Section):
    """QK-clip (Kimi Team 2025, arXiv 2507.20534, section 2.1): attention heads whose scores grow too large get smaller queries."""

    limit: float = Field(
        100.0,
        gt=0,
        description="Largest score of a head before its queries are scaled down; measured as the log-sum-exp of a query, which is a little more.",
    )
