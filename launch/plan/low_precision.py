"""What a recipe of low precision does to a plan: bytes of its operands, and FLOPs that run at another peak.

Products of a weight with a recipe run at that recipe's peak, and around them operands are quantised: activations and their
gradients in a separate pass that writes codes along both dimensions, weights once for each product that reads them, or
once per step. What blocks keep and work with is measured of blocks that have the recipe (measured.py), but for codes of weights.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import lru_cache

from amfm.launch.plan.activations import Storage
from amfm.launch.plan.layout import Layout, StageShare
from amfm.model.config.low_precision import LowPrecisionConfig, RecipeName
from amfm.model.config.schema import ModelConfig
from amfm.model.low_precision import narrow_matrices
from amfm.pretrain.config.schema import RunConfig

# Of a number in an operand, its share of a scale included; a weight's blocks have fewer scales, which is not counted.
OPERAND_BYTES: dict[RecipeName, float] = {"fp8_block": 1 + 4 / 128, "mxfp8": 1 + 1 / 32, "nvfp4": 0.5 + 1 / 16}
# Times that a number is read to be quantised: nvfp4 first looks for a matrix's largest.
READS: dict[RecipeName, int] = {"fp8_block": 1, "mxfp8": 1, "nvfp4": 2}


def planned_recipes(settings: LowPrecisionConfig, symbol: str) -> dict[str, RecipeName]:
    """Recipes of a narrow block's weights by name, as products run by them: none where they are emulated, which is wide."""
    return {} if settings.emulate else settings.recipes_of(symbol)


def narrow_kinds(config: RunConfig, held: StageShare, storage: Storage) -> frozenset[str]:
    """Kinds of block of which all on a stage multiply by a recipe of low precision; emulated they take what wide ones do."""
    if storage.backend != "triton" or config.low_precision.emulate:
        return frozenset()
    narrow = held.narrow_letters(config.low_precision.narrow_blocks(config.model.letters))
    return frozenset(symbol for symbol in narrow if narrow.count(symbol) == held.letters.count(symbol))


def kept_passes(settings: LowPrecisionConfig, micro_batches: int) -> int:
    """Micro-batches that share a weight's codes, 0 where each product makes them."""
    return micro_batches if settings.quantize_weights == "each_step" else 0


def code_bytes(model: ModelConfig, settings: LowPrecisionConfig, layout: Layout, held: StageShare) -> float:
    """Bytes of codes of its weights that a rank of a pipeline stage has at once during a step.

    In two directions of all of them where they are made once a step, else the largest of one.
    """
    kept = largest = 0.0
    narrow = () if settings.emulate else held.narrow_letters(settings.narrow_blocks(model.letters))
    for symbol, times in Counter(narrow).items():
        for matrix, recipe in narrow_matrices(model, settings, symbol):
            ranks = (
                layout.expert * layout.expert_tensor if matrix.shard.per_expert and layout.expert > 1 else layout.tensor
            )
            size = OPERAND_BYTES[recipe] * math.prod(matrix.shape) / ranks
            kept, largest = kept + times * 2 * size, max(largest, size)
    return kept if settings.quantize_weights == "each_step" else largest


@lru_cache(maxsize=256)
def narrow_flops_per_token(model: ModelConfig, settings: LowPrecisionConfig) -> dict[RecipeName, float]:
    """FLOPs per token, forward and backward, of all products by each recipe; nothing where they are emulated."""
    found: dict[RecipeName, float] = {}
    blocks = Counter(model.letters[index] for index in settings.narrow_blocks(model.letters))
    products = 2 if settings.weight_gradient == "bf16" else 3
    for symbol, times in blocks.items() if not settings.emulate else ():
        for matrix, recipe in narrow_matrices(model, settings, symbol):
            numel = float(math.prod(matrix.shape))
            if matrix.shard.per_expert and model.moe is not None:
                numel *= model.moe.top_k / model.moe.num_experts
            found[recipe] = found.get(recipe, 0.0) + times * 2 * products * numel
    return found
