"""Roofline seconds of a rank's operations, forward and backward, of a feed-forward, which several kinds of block have, and of the head.

An operation takes the longer of its arithmetic at a stated part of the peak and its bytes at a stated part of the bandwidth
(Williams et al. 2009, "Roofline", section 3).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, Literal

from amfm.kernels.moe.low_precision import makes_codes
from amfm.launch.plan.activations import FLOAT32_BYTES, Storage, slice_rows, up_rows
from amfm.launch.plan.hardware import Hardware
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.low_precision import OPERAND_BYTES, READS
from amfm.model.config.low_precision import RecipeName
from amfm.model.config.schema import ModelConfig
from amfm.model.config.structure import Activation, FeedForwardPart
from amfm.pretrain.config.schema import RunConfig

CODES: RecipeName = "fp8_block"  # by which hidden rows are kept
# By a library; by a grouped kernel, as experts are, though it be of one matrix; of a rank's only expert, as fast as dense ones, with
# the passes of experts around it.
ProductKind = Literal["dense", "grouped", "only_expert"]


class Roofline:
    """Sum of roofline seconds of forward and backward operations on one device.

    `forwards` is 2 where blocks are recomputed, so that every method counts the forward part once more. `accumulates`: products
    add a weight's gradient to its float32 sum, which they read and write, where others write it. `recipes`: of low precision,
    by the names of weights; `wide_gradient`: their third product keeps the run's precision; `kept_passes`: micro-batches that use
    the codes of a weight which are made once, 0 where each product makes them; `saves_codes`: hidden rows are kept as codes.
    """

    def __init__(
        self,
        hardware: Hardware,
        precision: str,
        element_bytes: int,
        forwards: int = 1,
        *,
        accumulates: bool = False,
        recipes: Mapping[str, RecipeName] = MappingProxyType({}),
        wide_gradient: bool = False,
        kept_passes: int = 0,
        saves_codes: bool = False,
    ) -> None:
        self.recipes, self.wide_gradient, self.kept_passes = recipes, wide_gradient, kept_passes
        self.saves_codes = saves_codes
        self.hardware, self.element_bytes, self.forwards, self.accumulates = (
            hardware,
            element_bytes,
            forwards,
            accumulates,
        )
        self.peak = hardware.peak_flops(precision)
        self.bandwidth = hardware.memory_bytes_per_second * hardware.memory_efficiency
        self.seconds = 0.0

    def product(
        self,
        rows: float,
        inputs: float,
        outputs: float,
        *,
        groups: int = 1,
        kind: ProductKind = "dense",
        weight: str = "",
        made: Collection[str] = (),
    ) -> None:
        """Add [rows, in] x [in, out] and the two products of its backward pass; `groups` matrices share the rows.

        Several are multiplied by a grouped kernel. `weight`: its name below the mixer, by which it may have a recipe. `made`: which of "input", "output" and "gradient" of a product by a recipe are codes where they are
        made, and never wide in memory.
        """
        recipe = self.recipes.get(weight)
        if recipe is not None:
            self._narrow_product(rows, inputs, outputs, groups, recipe, made, kind)
            return
        efficiency = self._efficiency(groups, kind)
        size = self.element_bytes
        arithmetic, weights = 2 * rows * inputs * outputs / (self.peak * efficiency), groups * inputs * outputs
        for times, bytes_each in (
            (self.forwards + 1, size),
            (1, 2 * FLOAT32_BYTES if self.accumulates else size),
        ):
            moved = size * rows * (inputs + outputs) + bytes_each * weights
            self.seconds += times * max(arithmetic, moved / self.bandwidth)

    def _efficiency(self, groups: int, kind: ProductKind) -> float:
        """Of the peak of the run's precision."""
        is_grouped = groups > 1 or kind == "grouped"
        return self.hardware.grouped_efficiency if is_grouped else self.hardware.product_efficiency

    def logits(self, rows: float, inputs: float, outputs: float) -> None:
        """Add a product whose float32 result is not rounded, as of a router (`linear_float32` in kernels/linear).

        Tensor cores take bfloat16 factors as they are. Backward cuts the gradient of the result into two halves of bfloat16,
        and makes each of its two products of both. What cuts is PyTorch's, and measured with what else is between kernels.
        """
        e, wide = self.element_bytes, FLOAT32_BYTES
        if e == wide:
            self.product(rows, inputs, outputs)
            return
        arithmetic = 2 * rows * inputs * outputs / (self.peak * self.hardware.product_efficiency)
        sides, weights = rows * (e * inputs + wide * outputs), inputs * outputs
        third = 2 * (2 * wide if self.accumulates else e) * weights
        for passes, products, moved in (
            (self.forwards, 1, sides + e * weights),
            (1, 2, sides + 2 * e * weights),
            (1, 2, sides + third),
        ):
            self.seconds += passes * max(products * arithmetic, moved / self.bandwidth)

    def _narrow_product(
        self,
        rows: float,
        inputs: float,
        outputs: float,
        groups: int,
        recipe: RecipeName,
        made: Collection[str],
        kind: ProductKind,
    ) -> None:
        """`product` by a recipe, with the passes that quantise its operands."""
        hardware, e, b = self.hardware, self.element_bytes, OPERAND_BYTES[recipe]
        flops, weights = 2 * rows * inputs * outputs, groups * inputs * outputs
        rate = hardware.recipe_peak(recipe) * hardware.recipe_efficiency(
            recipe, grouped=groups > 1 or kind == "grouped"
        )
        wide = self.peak * self._efficiency(groups, kind)
        sums = 2 * FLOAT32_BYTES if self.accumulates else e
        third = e if self.wide_gradient else b
        for times, seconds, moved in (
            (
                self.forwards,
                flops / rate,
                rows * (b * inputs + (b if "output" in made else e) * outputs) + b * weights,
            ),
            (1, flops / rate, rows * (b * outputs + e * inputs) + b * weights),
            (1, flops / (wide if self.wide_gradient else rate), third * rows * (inputs + outputs) + sums * weights),
        ):
            self.seconds += times * max(seconds, moved / self.bandwidth)
        # Codes along rows, and along columns where the third product takes them; a weight's for either direction.
        # Columns of experts' inputs are made in backward.
        codes, columns = (b, 0.0) if self.wide_gradient else (2 * b, b)
        read = e * READS[recipe]
        of_input, of_gradient = (0.0 if side in made else read for side in ("input", "gradient"))
        if groups > 1 or kind != "dense":
            quantised = self.forwards * rows * inputs * (of_input + b) + bool(columns) * rows * inputs * (of_input + b)
        else:
            quantised = self.forwards * rows * inputs * (of_input + codes)
        quantised += rows * outputs * (of_gradient + codes)
        if self.kept_passes:
            quantised += weights * (read + 2 * b) / self.kept_passes
        else:
            quantised += weights * (self.forwards + 1) * (read + b)
        self.seconds += quantised / self.bandwidth

    def mixing(self, flops: float, moved: float, *, backward: float = 2.5) -> None:
        """Add attention or a scan, given forward `flops` and bytes moved.

        Backward costs `backward` times the forward pass: 2.5 where it recomputes the scores.
        """
        hardware = self.hardware
        rate = hardware.attention_backward_efficiency or hardware.attention_efficiency
        for passes, efficiency in ((self.forwards, hardware.attention_efficiency), (backward, rate)):
            self.seconds += passes * max(flops / (self.peak * efficiency), moved / self.bandwidth)

    def moves(self, rows: float, moved: tuple[float, float]) -> None:
        """Add memory-bound operations by the bytes that they move of each row, forward and backward."""
        self.seconds += rows * (self.forwards * moved[0] + moved[1]) / self.bandwidth

    def backward_passes(self, moved: float) -> None:
        """Add memory-bound operations of backward by the bytes they move."""
        self.seconds += moved / self.bandwidth

    def passes(self, moved: float) -> None:
        """Add memory-bound operations by the bytes they move, forward and backward together; a third are forward's."""
        self.seconds += (self.forwards + 2) / 3 * moved / self.bandwidth


def add_feed_forward(
    line: Roofline,
    rows: float,
    width: int,
    units: float,
    activation: Activation,
    groups: int = 1,
    *,
    kind: ProductKind = "dense",
    weights: tuple[str, str] = ("", ""),
) -> None:
    """Up and down projection with the activation between them, `units` hidden units wide on this rank; `weights`: their names."""
    up, recipe, e = up_rows(1, activation) * units, line.recipes.get(weights[0]), line.element_bytes
    how: dict[str, Any] = {"groups": groups, "kind": kind}
    if recipe is not None and kind != "dense" and makes_codes(recipe, int(units), activation):
        # The activation is in the first product's epilogue; its gradient reads what was kept of the hidden rows.
        b = OPERAND_BYTES[recipe]
        first = ["output"] * line.saves_codes + ["gradient"] * (not line.wide_gradient)
        line.product(rows, width, up, weight=weights[0], made=first, **how)
        line.product(rows, units, width, weight=weights[1], made=["input"], **how)
        line.backward_passes(rows * ((b if line.saves_codes else e) * up + e * units))
        if line.wide_gradient:  # which takes the gradient and the activation wide
            line.backward_passes(rows * e * (up + units))
        return
    line.product(rows, width, up, weight=weights[0], **how)
    line.product(rows, units, width, weight=weights[1], **how)
    # Experts by a recipe quantise the activation as they make it, and make it again in backward; a rank's only expert stores it twice.
    written = 1 if recipe is not None and kind != "dense" else 3 if kind == "only_expert" else 2
    line.passes(rows * (3 * up + written * units) * e)
    if recipe is not None and kind == "dense" and line.saves_codes:
        # Codes of hidden rows are a pass of their own; backward makes of them the rows, their activation and its codes.
        packed = line.forwards * (e + OPERAND_BYTES[CODES]) + OPERAND_BYTES[CODES] + e
        line.backward_passes(rows * (packed * up + e * (up + 2 * units)))


def add_part(line: Roofline, model: ModelConfig, layout: Layout, tokens: float, part: FeedForwardPart) -> None:
    """A dense feed-forward that tensor ranks share, of whole matrices or of factors; nothing of one that is left out."""
    if not part.inner:
        return
    if part.structure.kind == "dense":
        names = f"{part.place}up_proj.weight", f"{part.place}down_proj.weight"
        add_feed_forward(line, tokens, model.hidden_size, part.inner / layout.tensor, part.activation, weights=names)
    else:
        _add_factored(line, model, layout, tokens, part)


def _add_factored(line: Roofline, model: ModelConfig, layout: Layout, tokens: float, part: FeedForwardPart) -> None:
    """A feed-forward of two factors per matrix: the factor at the residual stream is whole on every rank, the other is cut."""
    inner, structure = part.inner, part.structure
    width, rows = model.hidden_size, up_rows(inner, part.activation)
    blocks, own = structure.blocks or 1, tokens / layout.stream_ranks
    enters, leaves = structure.between(width, rows), structure.between(inner, width)
    # Product by block: as many rows of a block's width, one group per block.
    line.product(own * blocks, width / blocks, enters / blocks, groups=blocks)
    second = blocks if structure.kind == "blockshuffle" else 1
    line.product(tokens * second / layout.tensor, enters / second, rows / second, groups=second)
    line.passes(tokens / layout.tensor * (3 * rows + 2 * inner) * line.element_bytes)
    line.product(tokens * blocks / layout.tensor, inner / blocks, leaves / blocks, groups=blocks)
    last = own if structure.kind == "lowrank" else tokens / layout.tensor
    line.product(last * second, leaves / second, width / second, groups=second)
    if model.self_guided_training is not None:
        add_feed_forward(line, tokens, width, inner / layout.tensor, part.activation)


def accumulates(layout: Layout, storage: Storage) -> bool:
    """Whether products add weight gradients to float32 sums, which ZeRO 1 and 2 have."""
    return storage.accumulates and layout.zero_stage in (1, 2)


def head_seconds(config: RunConfig, layout: Layout, hardware: Hardware, storage: Storage) -> float:
    """Seconds of final norm, logits, loss and both gradients, which are made in slices of rows (kernels/linear_cross_entropy).

    A whole head writes float32 logits and reads them for their gradient, and adds each slice's gradient of the weight to those
    before it; its scale is known after that. Tensor ranks make the logits again in backward, where they become their gradient.
    """
    model, tokens, e = config.model, layout.tokens(config), storage.element_bytes
    vocab, hidden, is_shared = model.vocab_size / layout.tensor, model.hidden_size, layout.tensor > 1
    forwards = 2 if is_shared and storage.backend == "triton" else 1
    is_added = accumulates(layout, storage) and is_shared
    line = Roofline(hardware, config.train.precision, e, forwards, accumulates=is_added)
    line.product(tokens, hidden, vocab)
    logits = 4 * FLOAT32_BYTES
    if storage.backend == "triton":
        logits = e if is_shared else 2 * FLOAT32_BYTES + e
        slices = -(-tokens // slice_rows(vocab, "triton"))
        if not is_added:
            line.backward_passes((slices - 1) * (e + 2 * FLOAT32_BYTES) * vocab * hidden)
    line.backward_passes(logits * tokens * vocab + 9 * tokens * hidden * e)
    return line.seconds


def depth_seconds(config: RunConfig, layout: Layout, hardware: Hardware, storage: Storage) -> float:
    """Seconds of what an MTP layer has around its blocks: two norms and its projection."""
    hidden, tokens = config.model.hidden_size, layout.tokens(config)
    line = Roofline(hardware, config.train.precision, storage.element_bytes, accumulates=accumulates(layout, storage))
    line.passes(2 * 6 * tokens / layout.stream_ranks * hidden * storage.element_bytes)
    line.product(tokens, 2 * hidden / layout.tensor, hidden)
    return line.seconds
