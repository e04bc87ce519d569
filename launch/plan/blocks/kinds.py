"""The kinds of block whose costs are known in closed form; all others are planned as one that is built says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from amfm.kernels.delta_block.op import DeltaSizes, block_bytes, scan_bytes
from amfm.launch.plan.activations import FLOAT32_BYTES, Storage
from amfm.launch.plan.blocks import indexer
from amfm.launch.plan.blocks.block import PlannedBlock, add_products, measured_sizes
from amfm.launch.plan.blocks.indexer import PlannedLatent
from amfm.launch.plan.blocks.moe import PlannedMoe
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.roofline import Roofline, add_part
from amfm.model.build import sample_mixer
from amfm.model.config.core_options import AttentionConfig, FeedForwardConfig, Mamba2Config
from amfm.model.config.key_mixer_options import MlaOptions
from amfm.model.config.kinds import find_kind, kind_of
from amfm.model.config.mixer_options import (
    DeltaNetOptions,
    DeltaProductOptions,
    GatedDeltaNetOptions,
    KdaOptions,
    LinearOptions,
)
from amfm.model.config.moe import MoeConfig
from amfm.model.config.options import MixerOptions, ParallelOptions
from amfm.model.config.schema import ModelConfig
from amfm.model.mixers.delta import DeltaBlock
from amfm.pretrain.config.schema import RunConfig


class PlannedMamba2(PlannedBlock):
    """A Mamba2 block, of whose heads each tensor rank has a part."""

    options: Mamba2Config

    def add(self, line: Roofline, layout: Layout, storage: Storage, imbalance: float) -> None:
        """Projections, causal convolution, chunked scan and gated norm of a rank's heads."""
        mamba, e, hidden = self.options, line.element_bytes, self.model.hidden_size
        tokens, tensor = layout.tokens(self.config), layout.tensor
        inner, groups = mamba.inner_size() / tensor, max(1, mamba.num_groups / tensor)
        channels = inner + 2 * groups * mamba.state_size
        line.product(tokens, hidden, inner + channels + mamba.num_heads / tensor, weight="in_proj.weight")
        line.product(tokens, inner, hidden, weight="out_proj.weight")
        line.passes(tokens * channels * 5 * e + tokens * inner * 8 * e)  # convolution, gated norm
        # Scores once per group, their product with x, and the state's way in and out.
        scan = 2 * mamba.chunk_size * (groups * mamba.state_size + inner) + 4 * inner * mamba.state_size
        states = FLOAT32_BYTES * inner * mamba.state_size / mamba.chunk_size
        line.mixing(tokens * scan, tokens * ((channels + inner) * e + states))
        if layout.context > 1:
            # Segments are walked once more each way for the states that they hand on: x and B, or the gradient of y and C, are read.
            walk = tokens * 2 * inner * mamba.state_size, tokens * (inner + groups * mamba.state_size) * e
            line.mixing(*walk, backward=1)


class PlannedDelta(PlannedBlock):
    """A mixer on the delta rule, on the Triton backend one operation whose passes are known by formula."""

    options: LinearOptions

    def add(self, line: Roofline, layout: Layout, storage: Storage, imbalance: float) -> None:
        """Products, the scan, and what opens it and closes it, of a rank's heads; apart as of any kind."""
        sizes = sizes_at_once(self.model, self.symbol) if storage.backend == "triton" else None
        if sizes is None:
            super().add(line, layout, storage, imbalance)
            return
        tokens, tensor, e = layout.tokens(self.config), layout.tensor, line.element_bytes
        measured = measured_sizes(self.model, self.symbol, self.config.train.sequence_length)
        products = tuple(matrix for matrix in measured.matrices if matrix[0] != "conv.weight")
        add_products(line, replace(measured, matrices=products), layout, tokens)
        share, chunk = tokens / tensor, self.options.chunk_size
        around, around_back = (share * block_bytes(sizes, value_bytes=e, backward=way) for way in (False, True))
        scan, scan_back = (share * scan_bytes(sizes, chunk, value_bytes=e, backward=way) for way in (False, True))
        line.mixing(share * measured.sequence_flops, scan, backward=scan_back / scan)
        line.passes(3 * around)
        line.backward_passes(around_back - 2 * around)


@lru_cache(maxsize=64)
def sizes_at_once(config: ModelConfig, symbol: str) -> DeltaSizes | None:
    """Sizes of a whole mixer that runs as one operation; None for one without a convolution, whose parts run in turn."""
    mixer = sample_mixer(config, symbol)
    return mixer.delta_sizes() if isinstance(mixer, DeltaBlock) and mixer.conv is not None else None


class PlannedAttention(PlannedBlock):
    """A block of causal attention, of whose query heads each tensor rank has a part."""

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
        if gates and storage.backend != "triton":
            line.passes(tokens * (5 * query + 3 * gates) * e)
        if attention.qk_norm or attention.positions == "rope":
            line.passes(5 * tokens * (query + keys) * e)
        length = self.config.train.sequence_length
        if attention.indexer is not None:
            indexer.add_indexer(line, tokens, length, attention, hidden, tensor)
        if attention.indexer is None or attention.indexer.stage == "warm_up":
            line.mixing(tokens * 2 * (length + 1) * query, tokens * (2 * query + 2 * keys) * e)


class PlannedFeedForward(PlannedBlock):
    """A dense feed-forward, of whose channels each tensor rank has a part."""

    options: FeedForwardConfig

    def add(self, line: Roofline, layout: Layout, storage: Storage, imbalance: float) -> None:
        """Up and down projection with the activation between them."""
        for part in self.options.feed_forwards():
            add_part(line, self.model, layout, layout.tokens(self.config), part)


class PlannedParallel(PlannedBlock):
    """A block of mixers side by side: what each costs in its own block; each gathers the residual stream on its own."""

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


KNOWN: dict[type[MixerOptions], type[PlannedBlock]] = {
    Mamba2Config: PlannedMamba2,
    AttentionConfig: PlannedAttention,
    MoeConfig: PlannedMoe,
    FeedForwardConfig: PlannedFeedForward,
    MlaOptions: PlannedLatent,
    ParallelOptions: PlannedParallel,
    DeltaNetOptions: PlannedDelta,
    GatedDeltaNetOptions: PlannedDelta,
    DeltaProductOptions: PlannedDelta,
    KdaOptions: PlannedDelta,
}


def planned_block(config: RunConfig, symbol: str) -> PlannedBlock:
    """The blocks of a symbol of the pattern, as the planner sees them."""
    options = config.model.block_options(symbol)
    return KNOWN.get(kind_of(symbol).options, PlannedBlock)(config, symbol, options)
