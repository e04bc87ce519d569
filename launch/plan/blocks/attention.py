"""What an attention block costs: projections and causal attention; keys and values that context ranks gather."""

from __future__ import annotations

from collections.abc import Iterator

from amfm.launch.plan.activations import Storage
from amfm.launch.plan.blocks import indexer
from amfm.launch.plan.blocks.block import PlannedBlock
from amfm.launch.plan.exchange import Exchange, element_type
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.roofline import Roofline
from amfm.model.config.attention import AttentionConfig


class PlannedAttention(PlannedBlock):
    """A block of causal attention, of whose query heads each tensor rank has a part."""

    is_exact = True
    options: AttentionConfig

    def add(self, line: Roofline, layout: Layout, storage: Storage, imbalance: float) -> None:
        """Projections, q-k norm and rotation, gates, and causal attention over half of the row on average."""
        attention, e, hidden = self.options, line.element_bytes, self.model.hidden_size
        tokens, tensor = layout.tokens(self.config), layout.tensor
        query = attention.num_heads / tensor * attention.head_dim
        keys = max(1, attention.num_kv_heads / tensor) * attention.head_dim
        gates = {"none": 0.0, "head": query / attention.head_dim, "element": query}[attention.gate]
        line.product(tokens, hidden, query + 2 * keys + gates, weight="q_proj.weight")
        line.product(tokens, query, hidden, weight="o_proj.weight")
        if gates:
            line.passes(tokens * (5 * query + 3 * gates) * e)
        if attention.qk_norm or attention.positions == "rope":
            line.passes(5 * tokens * (query + keys) * e)
        length = self.config.train.sequence_length
        if attention.indexer is not None:
            indexer.add_indexer(line, tokens, length, attention, hidden, tensor)
        if attention.indexer is None or attention.indexer.stage == "warm_up":
            line.mixing(tokens * 2 * (length + 1) * query, tokens * (2 * query + 2 * keys) * e)

    def tensor_exchanges(self, layout: Layout, times: int) -> Iterator[Exchange]:
        """The crossings of its region, and what an indexer exchanges."""
        yield from super().tensor_exchanges(layout, times)
        yield from indexer.tensor_exchanges(self.config, layout, self.options, times)

    def context_exchanges(self, layout: Layout, times: int) -> Iterator[Exchange]:
        """Keys and values, gathered over the group in forward; their gradients are summed back to the owners in backward."""
        dtype, size = element_type(self.config)
        heads = max(1, self.options.num_kv_heads // layout.tensor)
        keys = layout.stage_ranks * 2 * layout.tokens(self.config) * heads * self.options.head_dim * size
        yield Exchange("cp", "all_gather", dtype, times, times * keys)
        yield Exchange("cp", "reduce_scatter", dtype, times, layout.context * times * keys)
        yield from indexer.context_exchanges(self.config, layout, self.options, times)
