"""A pipeline cut by planned seconds: where `|` of the pattern make the slowest stage shorter than the cut by FLOPs does.

How it works: a run balances its model chunks or ranks by FLOPs, which every rank knows; a block's seconds are not in proportion to them. So the
same search (`edges_by_rank`) starts again from the run's cut with seconds. The plan then estimates the cut as a pattern.
"""

from __future__ import annotations

from dataclasses import dataclass

from amfm.launch.plan.activations import storage_of
from amfm.launch.plan.estimate import Assumptions, Estimate, estimate
from amfm.launch.plan.hardware import Hardware
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.roofline import depth_seconds, head_seconds
from amfm.launch.plan.time import block_seconds
from amfm.model.config.pattern import Pattern
from amfm.model.pipeline_split import balanced_edges, cut_pieces, edges_by_rank
from amfm.pretrain.config.schema import RunConfig

LEAST_GAIN = 0.002  # of a step, below which a cut is not worth a longer pattern


@dataclass(frozen=True)
class TimedCut:
    """A pattern with `|` and the estimate of its run; `before`: of the run as it was cut."""

    pattern: str
    estimate: Estimate
    before: Estimate

    @property
    def gain(self) -> float:
        """Change of the step as a part of it, negative if it is shorter."""
        return self.estimate.step.total() / self.before.step.total() - 1


def cut_by_seconds(config: RunConfig, layout: Layout, hardware: Hardware, assumptions: Assumptions) -> TimedCut | None:
    """The cut of a run of one training stage whose slowest pipeline stage is shortest; None without one that fits and is faster."""
    if layout.pipeline == 1:
        return None
    model, pieces = config.model, layout.pipeline * layout.virtual_stages
    costs = seconds_of_blocks(config, layout, hardware, assumptions.imbalance)
    own = cut_pieces(model, pieces, config.train.sequence_length, layout.balance, layout.pipeline)
    starts = balanced_edges(costs, pieces), (0, *(piece.stop for piece in own))
    edges = edges_by_rank(costs, layout.pipeline, starts)
    parsed = model.parsed_pattern
    pattern = Pattern(parsed.letters, edges[1:-1], parsed.depth_letters, parsed.num_depths).canonical()
    cut = config.model_copy(update={"model": model.model_copy(update={"pattern": pattern})})
    found = TimedCut(
        pattern, estimate(cut, layout, hardware, assumptions), estimate(config, layout, hardware, assumptions)
    )
    return found if found.estimate.fits() and found.gain < -LEAST_GAIN else None


def seconds_of_blocks(config: RunConfig, layout: Layout, hardware: Hardware, imbalance: float) -> list[float]:
    """Seconds of each main block for a micro-batch; the last with those of the head and of all MTP layers."""
    model, storage = config.model, storage_of(config)
    narrow = config.low_precision.narrow_blocks(model.letters)
    main = [(symbol, index in narrow) for index, symbol in enumerate(model.letters)]
    depth = [(symbol, False) for symbol in model.parsed_pattern.depth_letters]
    once = {
        (symbol, is_narrow): block_seconds(config, symbol, layout, hardware, storage, imbalance, is_narrow=is_narrow)
        for symbol, is_narrow in {*main, *depth}
    }
    costs, head = [once[key] for key in main], head_seconds(config, layout, hardware, storage)
    costs[-1] += head
    if depth:
        around = head + depth_seconds(config, layout, hardware, storage)
        costs[-1] += model.num_depths * (around + sum(once[key] for key in depth))
    return costs
