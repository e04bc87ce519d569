"""Phases of the data: from which global sample on which weights and sequence length hold, and what is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amfm.data_pipeline.config import DataConfig  # pydantic takes longer to import than reading processes start


@dataclass(frozen=True)
class PhaseSettings:
    """Weights and sequence length from a global sample on.

    skipped: samples that are left out there. continues: with the order of the phase before, whose weights and length it has.
    """

    start_sample: int
    weights: Mapping[str, float]
    sequence_length: int
    skipped: int = 0
    continues: bool = False


@dataclass(frozen=True)
class EpochSpan:
    """Draws of one source between two changes of the sequence length; it begins with a new epoch.

    repeats: share of the source that the epoch before had given already when it was left unfinished.
    """

    first_draw: int
    first_epoch: int
    sequence_length: int
    rows_per_epoch: int
    repeats: float


def phases_of(config: DataConfig, sequence_length: int) -> tuple[PhaseSettings, ...]:
    """List the phases: the sources' own weights from sample 0, unless a given phase starts there, then the given ones.

    A synthetic task is its own source. ValueError for a phase that weighs a source the configuration does not have.
    """
    known = {source.name: source.weight for source in config.sources}
    if config.synthetic is not None:
        known = {config.synthetic.task: 1.0}
    phases = [PhaseSettings(0, {name: weight for name, weight in known.items() if weight}, sequence_length)]
    for given in config.phases:
        unknown = sorted(set(given.weights or {}) - set(known))
        if unknown:
            raise ValueError(
                f"data.phases: the phase at sample {given.start_sample} gives a weight to {unknown[0]!r}, which must be one of "
                f"data.sources: {', '.join(sorted(known))}"
            )
        before = phases[-1]
        weights, length = given.weights or before.weights, given.sequence_length or before.sequence_length
        phases.append(PhaseSettings(given.start_sample, dict(weights), length))
    return with_skips(phases[1:] if len(phases) > 1 and phases[1].start_sample == 0 else phases, config.skip)


def with_skips(phases: Sequence[PhaseSettings], skip: Sequence[tuple[int, int]]) -> tuple[PhaseSettings, ...]:
    """The same phases, with one that continues with the weights before it for each range of samples to leave out."""
    found = {phase.start_sample: phase for phase in phases}
    for start, stop in skip:
        before = max(first for first in found if first <= start)
        continues = found[before].continues or before < start
        found[start] = replace(found[before], start_sample=start, skipped=stop - start, continues=continues)
    return tuple(found[start] for start in sorted(found))
