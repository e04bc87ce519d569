"""What a recipe of low precision does to a plan: bytes of its operands, and FLOPs that run at another peak.

Products of a weight with a recipe run at that recipe's peak, and around them operands are quantised: activations and their
gradients in a pass of their own that writes codes along both dimensions, weights once for each product that reads them. Memory
is planned as without: codes of inputs take less than the bf16 that is counted for them.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

from amfm.model.config.low_precision import LowPrecisionConfig, RecipeName
from amfm.model.config.schema import ModelConfig
from amfm.model.low_precision import narrow_matrices

# Of a number in an operand, its share of a scale included; a weight's blocks have fewer scales, which is not counted.
OPERAND_BYTES: dict[RecipeName, float] = {"fp8_block": 1 + 4 / 128, "mxfp8": 1 + 1 / 32, "nvfp4": 0.5 + 1 / 16}


def planned_recipes(settings: LowPrecisionConfig, letter: str) -> dict[str, RecipeName]:
    """Recipes of a narrow block's weights by name, as products run by them: none where they are emulated, which is wide."""
    return {} if settings.emulate else settings.recipes_of(letter)


@lru_cache(maxsize=256)
def narrow_flops_per_token(model: ModelConfig, settings: LowPrecisionConfig) -> dict[RecipeName, float]:
    """FLOPs a token, forward and backward, of all products by each recipe; nothing where they are emulated."""
    found: Counter[RecipeName] = Counter()
    blocks = Counter(model.letters[index] for index in settings.narrow_blocks(model.letters))
    products = 2 if settings.weight_gradient == "bf16" else 3
    for letter, times in blocks.items() if not settings.emulate else ():
        for matrix, recipe in narrow_matrices(model, settings, letter):
            numel = 1.0
            for size in matrix.shape:
                numel *= size
            if matrix.shard.per_expert and model.moe is not None:
                numel *= model.moe.top_k / model.moe.num_experts
            found[recipe] += times * 2 * products * numel  # type: ignore[assignment]
    return dict(found)
