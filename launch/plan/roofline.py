"""Roofline seconds of a rank's operations, forward and backward, and of the head.

An operation takes the longer of its arithmetic at a stated part of the peak and its bytes at a stated part of the bandwidth
(Williams et al. 2009, "Roofline", section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from amfm.kernels.low_precision.library_products import RUN
from amfm.launch.plan.activations import FLOAT32_BYTES, Product, Storage, slice_rows
from amfm.launch.plan.hardware import Hardware, Limit
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.low_precision import OPERAND_BYTES, READS
from amfm.model.config.low_precision import RecipeName
from amfm.pretrain.config.schema import RunConfig


class Roofline:
    """Sum of roofline seconds of forward and backward operations on one device.

    `forwards` is 2 where blocks are recomputed, so that every method counts the forward part once more. `accumulates`: products
    add a weight's gradient to its float32 sum, which they read and write, where others write it. `recipes`: of low precision,
    by the names of weights; `wide_gradient`: their third product keeps the run's precision; `kept_passes`: micro-batches that use
    the codes of a weight which are made once, 0 where each product makes them.
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
    ) -> None:
        self.recipes, self.wide_gradient, self.kept_passes = recipes, wide_gradient, kept_passes
        self.hardware, self.element_bytes, self.forwards, self.accumulates = (
            hardware,
            element_bytes,
            forwards,
            accumulates,
        )
        self.precision = precision
        self.bandwidth = hardware.memory_bytes_per_second * hardware.memory_efficiency
        self.seconds = 0.0

    def clock(self, flops: float, moved: float, limit: Limit, **settings: bool) -> float:
        """Seconds of an operation in the run's precision."""
        return self.hardware.operation_seconds(flops, moved, self.precision, limit, **settings)

    def product_of(self, product: Product, tokens: float) -> None:
        """Add a product that a measured block has per token."""
        rows, inputs, outputs = tokens * product.rows, product.inputs, product.outputs
        if product.is_wide:
            self.logits(rows, inputs, outputs)
        else:
            self.product(rows, inputs, outputs, groups=product.groups, weight=product.weight)

    def product(
        self,
        rows: float,
        inputs: float,
        outputs: float,
        *,
        groups: int = 1,
        grouped: bool = False,
        weight: str = "",
        is_fused: bool = False,
    ) -> None:
        """Add [rows, in] x [in, out] and the two products of its backward pass; `groups` matrices share the rows.

        Several are multiplied by a grouped kernel, and one where `grouped` says so. `weight`: its name below the mixer, by which it may
        have a recipe. `is_fused`: its forward part by that is a kernel of ours, whatever library makes others.
        """
        grouped = grouped or groups > 1
        recipe = self.recipes.get(weight)
        if recipe is not None:
            self._narrow_product(rows, inputs, outputs, groups, recipe, grouped=grouped, is_fused=is_fused)
            return
        size = self.element_bytes
        flops, weights = 2 * rows * inputs * outputs, groups * inputs * outputs
        for times, bytes_each in (
            (self.forwards + 1, size),
            (1, 2 * FLOAT32_BYTES if self.accumulates else size),
        ):
            moved = size * rows * (inputs + outputs) + bytes_each * weights
            self.seconds += times * self.clock(flops, moved, "grouped" if grouped else "product")

    def logits(self, rows: float, inputs: float, outputs: float) -> None:
        """Add a product whose float32 result is not rounded, as of a router (`linear_float32` in kernels/linear).

        Tensor cores take bfloat16 factors as they are. Backward cuts the gradient of the result into two halves of bfloat16,
        and makes each of its two products of both. What cuts is PyTorch's, and measured with what else is between kernels.
        """
        e, wide = self.element_bytes, FLOAT32_BYTES
        if e == wide:
            self.product(rows, inputs, outputs)
            return
        flops = 2 * rows * inputs * outputs
        sides, weights = rows * (e * inputs + wide * outputs), inputs * outputs
        third = 2 * (2 * wide if self.accumulates else e) * weights
        for passes, products, moved in (
            (self.forwards, 1, sides + e * weights),
            (1, 2, sides + 2 * e * weights),
            (1, 2, sides + third),
        ):
            self.seconds += passes * self.clock(products * flops, moved, "product")

    def _narrow_product(
        self,
        rows: float,
        inputs: float,
        outputs: float,
        groups: int,
        recipe: RecipeName,
        *,
        grouped: bool,
        is_fused: bool,
    ) -> None:
        """`product` by a recipe, with the passes that quantise its weight; rows are quantised by kernels, whose bytes are measured."""
        hardware, e, b = self.hardware, self.element_bytes, OPERAND_BYTES[recipe]
        flops, weights = 2 * rows * inputs * outputs, groups * inputs * outputs
        rate = own = hardware.recipe_peak(recipe) * hardware.recipe_efficiency(recipe, grouped=grouped)
        copied = 0.0
        if recipe == "fp8_block" and not grouped and hardware.fp8_own_efficiency is not None:
            own *= hardware.fp8_own_efficiency / hardware.fp8_efficiency
            copied = 0.0 if self.wide_gradient else 2 * rows * (inputs + outputs)  # column codes into one matrix
        sums = 2 * FLOAT32_BYTES if self.accumulates else e
        third = e if self.wide_gradient else b
        limit: Limit = "grouped" if grouped else "product"
        third_seconds = self.clock(flops, 0.0, limit) if self.wide_gradient else flops / rate
        for times, seconds, moved in (
            (
                self.forwards,
                flops / (own if is_fused or inputs % RUN else rate),
                rows * (b * inputs + e * outputs) + b * weights,
            ),
            (1, flops / (own if outputs % RUN else rate), rows * (b * outputs + e * inputs) + b * weights),
            (1, third_seconds, third * rows * (inputs + outputs) + sums * weights),
        ):
            self.seconds += times * max(seconds, moved / self.bandwidth)
        read = e * READS[recipe]
        if self.kept_passes:
            quantised = weights * (read + 2 * b) / self.kept_passes
        else:
            quantised = weights * (self.forwards + 1) * (read + b)
        self.seconds += (quantised + copied) / self.bandwidth

    def mixing(self, flops: tuple[float, float], moved: tuple[float, float], *, by_flash: bool = False) -> None:
        """Add attention or a scan, given FLOPs and bytes moved, forward and backward.

        `by_flash`: attention that FlashAttention computes.
        """
        for passes, index in ((self.forwards, 0), (1, 1)):
            self.seconds += passes * self.clock(
                flops[index], moved[index], "mixing", backward=index == 1, by_flash=by_flash
            )

    def moves(self, rows: float, moved: tuple[float, float]) -> None:
        """Add memory-bound operations by the bytes that they move of each row, forward and backward."""
        self.seconds += rows * (self.forwards * moved[0] + moved[1]) / self.bandwidth

    def backward_passes(self, moved: float) -> None:
        """Add memory-bound operations of backward by the bytes they move."""
        self.seconds += moved / self.bandwidth

    def passes(self, moved: float) -> None:
        """Add memory-bound operations by the bytes they move, forward and backward together; a third are forward's."""
        self.seconds += (self.forwards + 2) / 3 * moved / self.bandwidth


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
