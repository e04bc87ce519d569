"""What a dense feed-forward costs, whether its matrices are whole or products of two factors."""

from __future__ import annotations

from collections.abc import Iterator

from amfm.launch.plan.activations import Storage
from amfm.launch.plan.blocks.block import PlannedBlock
from amfm.launch.plan.exchange import Exchange, part_crossings
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.roofline import Roofline, add_part
from amfm.model.config.feed_forward import FeedForwardConfig


class PlannedFeedForward(PlannedBlock):
    """A dense feed-forward, of whose channels each tensor rank has a part."""

    is_exact = True
    options: FeedForwardConfig

    def add(self, line: Roofline, layout: Layout, storage: Storage, imbalance: float) -> None:
        """Up and down projection with the activation between them."""
        for part in self.options.feed_forwards():
            add_part(line, self.model, layout, layout.tokens(self.config), part)

    def tensor_exchanges(self, layout: Layout, times: int) -> Iterator[Exchange]:
        """One region; of factored matrices with other widths."""
        for part in self.options.feed_forwards():
            yield from part_crossings(self.config, layout, part, times)

    def context_exchanges(self, layout: Layout, times: int) -> Iterator[Exchange]:
        """Nothing: a token reads no other."""
        yield from ()
