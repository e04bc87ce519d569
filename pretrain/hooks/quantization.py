"""What quantizing costs the operands of products, now and then: parts that become zero or are clamped, and the error of the rest.

Of each operand of a product by a recipe the first rows are quantised once more, by the reference
(kernels/low_precision/formats), and compared with what they were (gradients of NVFP4 too, which products round at random). So
it measures the same on every device, and costs little. Outliers show first as zeros: one large number of a block leaves no
codes for the small ones, as in output projections of Mamba2 under NVFP4 (Nemotron 3 Super, arXiv 2604.12374).

Weights quantised once per step (kernels/low_precision/recipe.py): between its first pass and its update they stay as they
are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from amfm.kernels.low_precision.formats import E4M3_MAX, quantize
from amfm.kernels.low_precision.recipe import Recipe, Role, keep_weights, recipe_of, watch_operands
from amfm.pretrain.hook import Hook
from amfm.pretrain.micro_batch import LossShare, MicroBatch
from amfm.pretrain.run import Run
from amfm.pretrain.stages import is_due
from amfm.pretrain.step_sums import StepResult

# Rows of an operand that are looked at: blocks of 128 rows and more, and few next to a micro-batch.
MEASURED_ROWS = 256
ROLES: tuple[Role, ...] = ("input", "gradient", "weight")
# Numbers that are not zero, those of them that become zero, those beyond the largest code, squares of errors and of numbers.
COUNTS = 5


def build_kept_weights(run: Run) -> list[Hook]:
    """The hook, where `low_precision.quantize_weights` asks for it."""
    return [KeptWeights()] if run.config.low_precision.quantize_weights == "each_step" else []


class KeptWeights(Hook):
    """Opens the block in which codes are kept before the passes, and ends it before anything changes a weight."""

    def __init__(self) -> None:
        self.block = ExitStack()

    def before_passes(self, micro_batches: Sequence[MicroBatch], share: LossShare) -> None:
        """Begin; a step whose passes are taken again starts over."""
        self.block.close()
        self.block.enter_context(keep_weights())

    def before_update(self) -> None:
        """Drop the codes."""
        self.block.close()

    def after_step(self, result: StepResult) -> None:
        """Drop them if there was no update."""
        self.block.close()

    def close(self) -> None:
        """Drop them where a step failed."""
        self.block.close()


def build_quantization(run: Run) -> list[Hook]:
    """The hook, where the run has a recipe."""
    return [] if run.config.low_precision.recipe == "none" else [Quantization(run)]


class Quantization(Hook):
    """Measures a whole step now and then, all kinds of block and all ranks together, into its line of metrics.jsonl."""

    def __init__(self, run: Run) -> None:
        self.run, self.every_steps = run, run.config.low_precision.measure_every_steps
        section, letters = run.config.low_precision, run.config.model.letters
        self.order = sorted(
            describe(symbol, name) for symbol in section.chosen(letters) for name in section.recipes_of(symbol)
        )
        self.losses: Losses | None = None
        self.watching = ExitStack()

    def before_passes(self, micro_batches: Sequence[MicroBatch], share: LossShare) -> None:
        """Begin to listen in a step that is due."""
        if is_due(self.run.progress.step + 1, self.every_steps):
            self.losses = Losses(self._names())
            self.watching.enter_context(watch_operands(self.losses.note))

    def before_update(self) -> None:
        """Stop listening."""
        self.watching.close()

    def after_step(self, result: StepResult) -> None:
        """Add up what all ranks saw."""
        self.watching.close()
        losses, self.losses = self.losses, None
        if losses is None:
            return
        sums = losses.stacked(self.order, self.run.parallel.device)
        if self.run.parallel.world_size > 1:
            torch.distributed.all_reduce(sums)
        result.found["low_precision"] = describe_losses(sums, self.order)

    def close(self) -> None:
        """Stop listening where a step failed."""
        self.watching.close()

    def _names(self) -> dict[int, str]:
        """What the weights here that have a recipe are called, by its seed."""
        names = {}
        for _, block in self.run.model.all_blocks():
            for name, weight in block.mixer.named_parameters():
                recipe = recipe_of(weight)
                if recipe is not None:
                    names[recipe.seed] = describe(block.letter, name)
        return names


def describe(symbol: str, name: str) -> str:
    """A weight of a kind of block, as metrics name it: `M out_proj`."""
    return f"{symbol} {name.removesuffix('.weight')}"


@torch.no_grad()
def count_losses(matrix: Tensor, recipe: Recipe, role: Role) -> Tensor:
    """Count what quantising the first rows of an operand [M, K] loses, [COUNTS] float64; no host waits.

    Numbers that are not finite count nowhere: health watches them.
    """
    wide = matrix[:MEASURED_ROWS].float()
    quantized = quantize(wide, recipe.name, weight=role == "weight")
    values = quantized.values()
    is_finite = wide.isfinite() & values.isfinite()
    wide, values = wide.where(is_finite, 0.0), values.where(is_finite, 0.0)
    is_e4m3 = quantized.whole is None
    largest = (quantized.codes & 0x7F) == 0x7E if is_e4m3 else (quantized.codes & 7) == 7
    is_beyond = largest & (wide.abs() > values.abs())
    if is_e4m3:
        # Rounding down to the largest code is not a clamp: its neighbour above would be 480.
        is_beyond &= wide.abs() > values.abs() * (464 / E4M3_MAX)
    parts = (
        (wide != 0).sum(),
        ((wide != 0) & (values == 0)).sum(),
        is_beyond.sum(),
        (values - wide).double().square().sum(),
        wide.double().square().sum(),
    )
    return torch.stack([part.double() for part in parts])


@dataclass
class Losses:
    """Sums of losses by weight and role, of the operands that a rank has seen. `names`: of the weights, by their seeds.

    Several weights may share a name, such as the output projections of all Mamba2 blocks.
    """

    names: Mapping[int, str]
    sums: dict[tuple[str, Role], Tensor] = field(default_factory=dict)

    def note(self, recipe: Recipe, role: Role, matrix: Tensor) -> None:
        """Add an operand; those of weights without a name are left out."""
        name = self.names.get(recipe.seed)
        if name is None or not len(matrix):
            return
        counts = count_losses(matrix, recipe, role)
        key = name, role
        self.sums[key] = self.sums[key] + counts if key in self.sums else counts

    def stacked(self, order: Sequence[str], device: torch.device) -> Tensor:
        """The sums as one tensor [names, roles, COUNTS] float64, in an order that all ranks have."""
        zeros = torch.zeros(COUNTS, dtype=torch.float64, device=device)
        rows = [torch.stack([self.sums.get((name, role), zeros) for role in ROLES]) for name in order]
        return torch.stack(rows)


def describe_losses(sums: Tensor, order: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Name what sums of all ranks [names, roles, COUNTS] say: parts from 0 to 1 and relative errors, by `weight role`.

    zeroed: of the numbers that were not zero. clamped: of the same, beyond the largest code of their block. error: of the
    operand, the norm of the difference over its norm.
    """
    found: dict[str, dict[str, Any]] = {"zeroed": {}, "clamped": {}, "error": {}}
    for name, roles in zip(order, sums.tolist(), strict=True):
        for role, (numbers, zeroed, clamped, error, norm) in zip(ROLES, roles, strict=True):
            if numbers and norm:
                key = f"{name} {role}"
                found["zeroed"][key] = zeroed / numbers
                found["clamped"][key] = clamped / numbers
                found["error"][key] = (error / norm) ** 0.5
    return found
