"""The kinds of block whose costs are known in closed form; all others are planned as one that is built says."""

from __future__ import annotations

from collections.abc import Iterator

from amfm.launch.plan.activations import Storage
from amfm.launch.plan.blocks.attention import PlannedAttention
from amfm.launch.plan.blocks.block import PlannedBlock
from amfm.launch.plan.blocks.feed_forward import PlannedFeedForward
from amfm.launch.plan.blocks.indexer import PlannedLatent
from amfm.launch.plan.blocks.mamba2 import PlannedMamba2
from amfm.launch.plan.blocks.moe import PlannedMoe
from amfm.launch.plan.exchange import Exchange
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.roofline import Roofline
from amfm.model.config.attention import AttentionConfig
from amfm.model.config.feed_forward import FeedForwardConfig
from amfm.model.config.key_mixer_options import MlaOptions
from amfm.model.config.kinds import find_kind
from amfm.model.config.mamba2 import Mamba2Config
from amfm.model.config.moe import MoeConfig
from amfm.model.config.options import MixerOptions
from amfm.model.config.parallel_heads import ParallelOptions
from amfm.pretrain.config.schema import RunConfig


class PlannedParallel(PlannedBlock):
    """A block of mixers side by side: what each costs in its own block; each gathers the stream on its own."""

    options: ParallelOptions

    def _parts(self) -> Iterator[PlannedBlock]:
        for name in self.options.names:
            symbol = find_kind(name).symbol
            model = self.model.model_copy(update={"pattern": symbol, "mtp": None})
            yield planned_block(self.config.model_copy(update={"model": model}), symbol)

    def add(self, line: Roofline, layout: Layout, storage: Storage, imbalance: float) -> None:
        """What all mixers compute."""
        for part in self._parts():
            part.add(line, layout, storage, imbalance)

    def tensor_exchanges(self, layout: Layout, times: int) -> Iterator[Exchange]:
        """What all mixers exchange."""
        for part in self._parts():
            yield from part.tensor_exchanges(layout, times)

    def context_exchanges(self, layout: Layout, times: int) -> Iterator[Exchange]:
        """The same over context ranks."""
        for part in self._parts():
            yield from part.context_exchanges(layout, times)


KNOWN: dict[type[MixerOptions], type[PlannedBlock]] = {
    Mamba2Config: PlannedMamba2,
    AttentionConfig: PlannedAttention,
    MoeConfig: PlannedMoe,
    FeedForwardConfig: PlannedFeedForward,
    MlaOptions: PlannedLatent,
    ParallelOptions: PlannedParallel,
}


def planned_block(config: RunConfig, letter: str) -> PlannedBlock:
    """The blocks of a symbol of the pattern, as the planner sees them."""
    options = config.model.block_options(letter)
    return KNOWN.get(type(options), PlannedBlock)(config, letter, options)
