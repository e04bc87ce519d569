"""Sections of our own hooks: distillation, pruning, forgetting, QK-clip, a moving average of the weights, traces of choices.

Sections of validation sets: held-out text that is measured on its own and reported by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, get_args

from pydantic import Field

from amfm.data_pipeline.config import DataConfig, SourceConfig
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


class ValidationSet(Section):
    """Held-out text measured on its own: before the first step, with each validation, and after the last step."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$", description="Name in the log, metrics and report.")
    source: str | None = Field(
        None, description="Its text: the held-out documents of this source in data.sources; null: of the set's name."
    )
    paths: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="Its text: files that are never trained on, as data.sources.*.paths; a source of weight 0 is added for them.",
    )
    batches: int | None = Field(
        None, gt=0, description="Global batches, at most the whole text once; null: train.validation_batches."
    )
    tokens: float | None = Field(None, gt=0, description="At least this many tokens instead of batches.")

    @property
    def source_name(self) -> str:
        """Name of its source."""
        return self.source or self.name


def with_sources(sets: tuple[ValidationSet, ...], data: DataConfig) -> tuple[tuple[ValidationSet, ...], DataConfig]:
    """The same with a source of weight 0, all held out, instead of the paths of each set."""
    added = tuple(
        SourceConfig(name=each.name, paths=each.paths, weight=0.0, validation_fraction=1.0)
        for each in sets
        if each.paths is not None and each.source is None
    )
    new = {source.name for source in added}
    named = tuple(each.model_copy(update={"paths": None}) if each.name in new else each for each in sets)
    return named, data.model_copy(update={"sources": data.sources + added})


def validation_problems(
    sets: tuple[ValidationSet, ...], data: DataConfig, mixtures: Iterable[Mapping[str, float] | None]
) -> Iterator[tuple[str, str, str]]:
    """Settings of validation sets that cannot take effect: key, rule and fix. `mixtures`: weights of later parts of a run."""
    sources = {source.name: source for source in data.sources}
    weighed = {name for name, source in sources.items() if source.weight}
    weighed |= {name for weights in mixtures for name, weight in (weights or {}).items() if weight}
    trained = {path: name for name in sorted(weighed & sources.keys()) for path in sources[name].paths}
    if sets and data.synthetic is not None:
        yield "validation", "needs text, and data.synthetic is a synthetic task", "remove one of the two"
        return
    for number, each in enumerate(sets):
        key, name = f"validation.{number}", each.source_name
        if each.name in [other.name for other in sets[:number]]:
            yield f"{key}.name", f"{each.name} is the name of another set too", "give each set its own name"
        if each.paths is not None:
            yield f"{key}.paths", "and source are both given", "remove one of the two"
        if each.batches is not None and each.tokens is not None:
            yield f"{key}.tokens", "and batches are both given", "remove one of the two"
        if name not in sources:
            yield f"{key}.source", f"{name} is not a name of data.sources", f"use one of {', '.join(sources)}, or paths"
        elif data.held_out(sources[name]) == 0 and data.megatron_split is None:
            yield f"{key}.source", f"{name} holds no documents out", "raise its validation_fraction, and prepare again"
        elif data.held_out(sources[name]) == 1:
            both = sorted(set(sources[name].paths) & trained.keys())
            if both:
                rule = f"{both[0]} is trained on, by source {trained[both[0]]}"
                yield key, rule, f"use source: {trained[both[0]]}, whose held-out documents are not"
