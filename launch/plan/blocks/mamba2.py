"""What a Mamba2 block costs: projections, convolution and scan; states and windows that pass between context ranks."""

from __future__ import annotations

from collections.abc import Iterator

from amfm.launch.plan.activations import FLOAT32_BYTES, Storage
from amfm.launch.plan.blocks.block import PlannedBlock
from amfm.launch.plan.blocks.context_traffic import exchanged_windows, handed_states
from amfm.launch.plan.exchange import FLOAT32, Exchange, element_type
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.roofline import Roofline
from amfm.model.config.mamba2 import Mamba2Config


class PlannedMamba2(PlannedBlock):
    """A Mamba2 block, of whose heads each tensor rank has a part."""

    is_exact = True
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

    def tensor_exchanges(self, layout: Layout, times: int) -> Iterator[Exchange]:
        """One region, and mean squares of a norm whose group lies on several ranks."""
        yield from super().tensor_exchanges(layout, times)
        if self.options.num_groups < layout.tensor:
            numbers = layout.stage_ranks * layout.tokens(self.config) * self.options.num_groups
            yield Exchange("tp", "all_reduce", "float32", 2 * times, 2 * times * numbers * FLOAT32)

    def context_exchanges(self, layout: Layout, times: int) -> Iterator[Exchange]:
        """States and decays, and the convolution's windows at the edges of segments."""
        dtype, size = element_type(self.config)
        ranks, rows, context, tensor = layout.stage_ranks, layout.micro_batch_size, layout.context, layout.tensor
        states = ranks * handed_states(self.options, rows, tensor)
        windows = ranks // context * exchanged_windows(self.options, rows, context, tensor, size)
        yield Exchange("cp", "all_gather", "float32", 2 * times, times * states)
        yield Exchange("cp", "all_to_all", dtype, 2 * times, times * windows)
