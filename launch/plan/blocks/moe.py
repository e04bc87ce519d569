"""What a mixture of experts costs: router, experts, shared expert, and what ranks exchange around them.

What spread experts exchange over the expert axis is in `expert_traffic.py`, and how much of it is waited for in
`expert_time.py`.
"""

from __future__ import annotations

from amfm.launch.plan.activations import FLOAT32_BYTES, Storage
from amfm.launch.plan.blocks.block import PlannedBlock
from amfm.launch.plan.blocks.expert_traffic import sent_rows, static_slots
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.roofline import Roofline, add_feed_forward, add_part
from amfm.model.config.moe import MoeConfig
from amfm.model.config.structure import matrices_of
from amfm.model.moe.transfer import expected_ranks
from amfm.pretrain.config.schema import RunConfig


class PlannedMoe(PlannedBlock):
    """A block of routed experts, with or without a shared one."""

    options: MoeConfig

    def add(self, line: Roofline, layout: Layout, storage: Storage, imbalance: float) -> None:
        """Router, latent projections, this rank's experts, what moves their rows, and the shared expert."""
        moe, tokens, hidden = self.options, layout.tokens(self.config), self.model.hidden_size
        width, is_spread = moe.latent_size or hidden, layout.expert > 1
        routed = tokens / (layout.tensor if is_spread else layout.stream_ranks)  # whose router runs here
        line.logits(routed, hidden, moe.num_experts)
        # The kernel reads logits and writes scores; backward reads these and their gradient, and writes that of the logits.
        is_measured = storage.backend == "triton"
        line.passes((5 if is_measured else 6) * routed * moe.num_experts * FLOAT32_BYTES)
        if moe.latent_size is not None:
            line.product(routed, hidden, width)
            line.product(routed, width, hidden)
        add_experts(line, self.config, moe, tokens, layout, imbalance)
        self._add_moves(line, layout, storage, imbalance, routed, width)
        for part in moe.feed_forwards():
            add_part(line, self.model, layout, tokens, part)
        if moe.shared_expert_gate and not is_measured:
            line.passes(tokens / layout.stream_ranks * 5 * hidden * line.element_bytes)

    def _add_moves(
        self, line: Roofline, layout: Layout, storage: Storage, imbalance: float, routed: float, width: int
    ) -> None:
        """Add what gathers rows for experts and sums their results, of `routed` tokens at this many numbers each."""
        moe, tokens, e = self.options, layout.tokens(self.config), line.element_bytes
        is_spread = layout.expert > 1
        if is_spread and static_slots(self.config, layout) is None:
            # To rows for other ranks and back from them, twice each; there sums over choices of products in expert order.
            sent, reached = sent_rows(self.config, layout), expected_ranks(moe, layout.expert)
            # Places are as many on every rank, and empty ones are cleared.
            uneven, empty = (imbalance, 0.0) if layout.expert_buffer_factor is None else (1.0, sent - reached)
            # A rank's only expert gives the row that is sent back.
            gives_rows = has_only_expert(self.config, layout)
            arrived = 0.0 if gives_rows else layout.expert_tensor * (imbalance * moe.top_k + uneven * sent)
            line.passes(2 * routed * (3 * sent + empty + arrived + 1) * width * e)
        elif not is_spread and storage.backend == "triton":
            # Sums over choices of products in expert order, of results and of gradients; rows are read where they are.
            line.passes(2 * tokens * (moe.top_k + 1) * width * e)
        else:
            # Into expert order, back, and both gradients.
            rows = tokens * moe.top_k * (imbalance * layout.expert_tensor / layout.tensor if is_spread else 1.0)
            line.passes(rows * width * (4 * e + 2 * FLOAT32_BYTES))


def add_experts(
    line: Roofline, config: RunConfig, moe: MoeConfig, tokens: float, layout: Layout, imbalance: float
) -> None:
    """Add the products of this rank's rows, grouped by expert; in halves weights are read twice, and their gradients made and added.

    A rank's only expert has products as dense ones are (kernels/moe `only_expert_feed_forward`), and computes empty places too.
    """
    width, experts = moe.expert_width(config.model.hidden_size), moe.num_experts // layout.expert
    rows, is_only = tokens * moe.top_k, has_only_expert(config, layout)
    if layout.expert > 1:
        # This rank's tokens' worth of rows, gathered over the ranks that cut an expert's width.
        rows *= layout.expert_tensor / layout.tensor
        if is_only and layout.expert_buffer_factor is not None:
            rows *= sent_rows(config, layout) / moe.top_k
        else:
            rows *= imbalance
    units, parts = moe.expert_hidden_size / layout.width_ranks, layout.expert_parts
    for _ in range(parts):
        add_feed_forward(
            line,
            rows / parts,
            width,
            units,
            moe.activation,
            groups=experts,
            kind="only_expert" if is_only else "grouped",
            weights=("experts.up", "experts.down"),
        )
    if parts > 1:
        # Of the two gradients one is read and added to, which is read and written.
        weights = experts * units * width * matrices_of(moe.activation)
        line.seconds += 3 * weights * line.element_bytes / line.bandwidth


def has_only_expert(config: RunConfig, layout: Layout) -> bool:
    """Whether all rows that a rank gets are those of its only expert (model/moe/by_rank.py); slots are sorted still."""
    moe = config.model.moe
    if moe is None or layout.expert == 1 or moe.num_experts > layout.expert:
        return False
    return static_slots(config, layout) is None
