"""Sections of validation sets: held-out text that is measured on its own and reported by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from pydantic import Field

from amfm.data_pipeline.config import DataConfig, SourceConfig
from amfm.model.config.section import Section


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
