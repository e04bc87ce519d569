"""Which source a global sample comes from, by phases of the data: integer quotas, exact in every block, the same on every rank.

Samples are cut into blocks of equal size. In each block every source has a fixed number of samples (its quota), and a keyed
permutation of the block decides where. So shares are exact after every block and not only on average, the number of draws
from a source before any sample is found without walking over the samples, and a sample's source follows only from its
number. Independent draws by weight would need a counter that every resume and rank agrees on.

A phase changes the weights at a global sample. Draws of each source are numbered through the whole run, so a source
continues in the next phase where it was: no row is lost or repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from amfm.data_pipeline.samples.permutation import Indices, derive_key, permute

if TYPE_CHECKING:
    from amfm.data_pipeline.config import DataConfig  # pydantic takes longer to import than reading processes start

MIN_BLOCK_SAMPLES = 4096


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


def make_quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """Turn weights into integers that sum to the samples of a mixture block (largest remainder).

    The block has 4096 samples, or the power of two of at least 8 / (smallest share), so that each source gets 8 or
    more and no share is off by more than one sample a block. Raises ValueError for a weight that is not positive.
    """
    for weight in weights:
        if not weight > 0 or not np.isfinite(weight):
            raise ValueError(f"weight {weight} must be a positive finite number; leave the source out to not use it")
    total = float(sum(weights))
    shares = [weight / total for weight in weights]
    if min(shares) < 2**-30:
        raise ValueError(f"the smallest weight is {min(shares):.2e} of all; it must be at least {2**-30:.2e}")
    block_samples = MIN_BLOCK_SAMPLES
    while block_samples < 8 / min(shares):
        block_samples *= 2
    exact = [share * block_samples for share in shares]
    quotas = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: (quotas[index] - exact[index], index))
    for index in by_remainder[: block_samples - sum(quotas)]:
        quotas[index] += 1
    return tuple(quotas)


@lru_cache(maxsize=32)
def _block_slots(quotas: tuple[int, ...], key: bytes) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Compute the source of each sample of a block, and how many samples of that source come before it in the block."""
    block_samples = sum(quotas)
    bounds = np.cumsum(quotas)
    sources = np.searchsorted(bounds, permute(np.arange(block_samples), block_samples, key), side="right")
    ranks = np.empty(block_samples, dtype=np.int64)
    for source in range(len(quotas)):
        mine = sources == source
        ranks[mine] = np.arange(int(mine.sum()))
    return sources.astype(np.int32), ranks


class Shift(NamedTuple):
    """Samples left out where a phase starts, and whether it continues with the order of the phase before."""

    skipped: int
    continues: bool


@dataclass(frozen=True)
class Phase:
    """A stretch of global samples with fixed weights, and how far each source had been drawn when it began.

    start_sample: first global sample. sources: names. quotas: samples of each source in a block.
    first_draws: number of the first draw of each source here; draws are counted over the whole run. order_start: first sample
    of the order that it goes through, its own, or that of a phase before; shift: samples of that order that were left out.
    """

    start_sample: int
    sources: tuple[str, ...]
    quotas: tuple[int, ...]
    first_draws: tuple[int, ...]
    seed: int
    order_start: int
    shift: int = 0

    @property
    def block_samples(self) -> int:
        """Samples after which every quota is met exactly."""
        return sum(self.quotas)

    def draws(self, samples: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Map global samples of this phase to (index of the source, number of the draw from it)."""
        offset = samples + (self.shift - self.order_start)
        if len(self.quotas) == 1:
            return np.zeros(len(samples), dtype=np.int32), offset + self.first_draws[0]
        blocks, inside = np.divmod(offset, self.block_samples)
        sources = np.empty(len(samples), dtype=np.int32)
        draws = np.empty(len(samples), dtype=np.int64)
        quotas, first = np.array(self.quotas), np.array(self.first_draws)
        for block in np.unique(blocks):
            mine = blocks == block
            slot_sources, slot_ranks = _block_slots(self.quotas, self._block_key(int(block)))
            chosen = slot_sources[inside[mine]]
            sources[mine] = chosen
            draws[mine] = first[chosen] + block * quotas[chosen] + slot_ranks[inside[mine]]
        return sources, draws

    def draws_before(self, sample: int) -> dict[str, int]:
        """Count the draws from each source in the whole run before a global sample of this phase or right after it."""
        block, inside = divmod(sample + self.shift - self.order_start, self.block_samples)
        counts = np.array(self.first_draws) + block * np.array(self.quotas)
        if inside:
            slot_sources, _ = _block_slots(self.quotas, self._block_key(block))
            counts = counts + np.bincount(slot_sources[:inside], minlength=len(self.quotas))
        return dict(zip(self.sources, (int(count) for count in counts)))

    def _block_key(self, block: int) -> bytes:
        return derive_key(self.seed, "mixture", self.order_start, block)


class Mixture:
    """The phases of a run in order; a pure function of (seed, weights, starts) that no resume or world size changes."""

    def __init__(
        self,
        phases: Sequence[tuple[int, Mapping[str, float]]],
        seed: int,
        shifts: Mapping[int, Shift] = MappingProxyType({}),
    ) -> None:
        """Take (first global sample, weight by source) for each phase; the first starts at 0.

        shifts: samples that are left out where a phase starts, by its first one, and whether it continues with the order of the
        phase before it.
        """
        if not phases or phases[0][0] != 0:
            raise ValueError("the first phase must start at global sample 0")
        self.phases: list[Phase] = []
        drawn: dict[str, int] = {}
        for start, weights in phases:
            if self.phases:
                if start <= self.phases[-1].start_sample:
                    raise ValueError(
                        f"a phase starts at sample {start}, but the one before at {self.phases[-1].start_sample}; "
                        "order the phases by their start"
                    )
                drawn |= self.phases[-1].draws_before(start)
            names = tuple(sorted(weights))
            quotas = make_quotas([weights[name] for name in names])
            first_draws = tuple(drawn.get(name, 0) for name in names)
            skipped, continues = shifts.get(start, Shift(0, False))
            phase = Phase(start, names, quotas, first_draws, seed, start)
            phase = replace(self.phases[-1], start_sample=start) if continues else phase
            self.phases.append(replace(phase, shift=phase.shift + skipped))

    def draws_by_source(self, samples: npt.NDArray[np.int64]) -> dict[str, tuple[Indices, Indices]]:
        """Group samples by source: by name, their places among `samples` and the numbers of the draws.

        Arrays in and out, because locating a micro-batch must cost less than reading it.
        """
        starts = np.array([phase.start_sample for phase in self.phases])
        phase_of = np.searchsorted(starts, samples, side="right") - 1
        found: dict[str, list[tuple[Indices, Indices]]] = {}
        for number in np.unique(phase_of).tolist():
            phase, where = self.phases[number], np.flatnonzero(phase_of == number)
            sources, draws = phase.draws(samples[where])
            for source in np.unique(sources).tolist():
                mine = sources == source
                found.setdefault(phase.sources[source], []).append((where[mine], draws[mine]))
        return {
            name: (np.concatenate([where for where, _ in pieces]), np.concatenate([draws for _, draws in pieces]))
            for name, pieces in found.items()
        }

    def draws(self, samples: npt.NDArray[np.int64]) -> list[tuple[str, int]]:
        """(source name, number of the draw from it) of each global sample."""
        out: list[tuple[str, int]] = [("", 0)] * len(samples)
        for name, (places, draws) in self.draws_by_source(samples).items():
            for place, draw in zip(places.tolist(), draws.tolist()):
                out[place] = (name, draw)
        return out

    def draws_before(self, sample: int) -> list[dict[str, int]]:
        """Draws by source within each phase that began before the global sample: the token ledger counts from these."""
        taken = []
        for number, phase in enumerate(self.phases):
            if number and phase.start_sample >= sample:
                break
            later = self.phases[number + 1].start_sample if number + 1 < len(self.phases) else sample
            begins, ends = phase.draws_before(phase.start_sample), phase.draws_before(min(sample, later))
            taken.append({name: ends[name] - begins[name] for name in phase.sources})
        return taken
