"""The section of 8-bit and 4-bit matrix multiplication, and to which blocks and weights it applies. No torch here.

Which weights of a kind of block can take a recipe says its row of the table of kinds; here the pattern and the settings say
which of them do. So a checkpoint holds nothing of it, and whoever asks (the model, checks, the plan) gets the same answer.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from amfm.model.config.kinds import kind_of
from amfm.model.config.pattern import parse_letters
from amfm.model.config.section import Section

RecipeName = Literal["fp8_block", "mxfp8", "nvfp4"]
DEFAULT_LETTERS = "ME-"


class LowPrecisionConfig(Section):
    """Products of blocks in 8 or 4 bits; embedding, head, router, norms, scans and attention itself are never narrowed."""

    recipe: Literal["none", "fp8_block", "mxfp8", "nvfp4"] = Field(
        "none",
        description="fp8_block: e4m3 in blocks of 128, on Hopper and later; mxfp8: e4m3 in blocks of 32; nvfp4: e2m1 in blocks of 16; both on Blackwell.",
    )
    block_types: str = Field(
        DEFAULT_LETTERS,
        description="Kinds of block whose products use the recipe, as recompute_blocks; of the default those that model.pattern has.",
    )
    bf16_first_layers: int = Field(0, ge=0, description="Blocks at the start of the pattern that keep train.precision.")
    bf16_last_layers: float = Field(
        0.0, ge=0, description="And at its end: a number of blocks, or below 1 a part of all, rounded up (nvfp4: 0.15)."
    )
    out_proj_recipe: Literal["same", "bf16", "mxfp8"] | None = Field(
        None,
        description="Recipe of the output projections of Mamba2 and linear mixers; null: mxfp8 under nvfp4, else the same.",
    )
    weight_gradient: Literal["same", "bf16"] = Field(
        "same", description="bf16: the product that makes the weights' gradients keeps train.precision."
    )
    activation_storage: Literal["bf16", "fp8"] = Field(
        "bf16",
        description="Hidden rows of experts and feed-forwards, kept for backward passes: fp8 as codes of e4m3 in blocks of 128, and norms before narrow blocks are made again.",
    )
    dispatch: Literal["bf16", "fp8"] = Field(
        "bf16",
        description="Tokens on their way to experts on other ranks, and gradients on theirs: fp8 as codes of e4m3 in blocks of 128; what returns is bf16.",
    )
    quantize_weights: Literal["each_product", "each_step"] = Field(
        "each_product",
        description="each_step: keep a step's codes of weights for all its micro-batches, in two directions: memory for fewer passes over weights.",
    )
    emulate: bool = Field(
        False,
        description="Quantize, then multiply in high precision: the same values on any device, slowly; for studies and tests.",
    )
    measure_every_steps: int = Field(
        100, gt=0, description="Steps between measurements of the quantization error, in metrics.jsonl and the report."
    )

    def chosen(self, letters: tuple[str, ...]) -> frozenset[str]:
        """The kinds of block in a pattern that take the recipe; raises ValueError for what names no block."""
        return parse_letters(self.block_types) & set(letters) if self.recipe != "none" else frozenset()

    def wide_at_end(self, num_blocks: int) -> int:
        """Blocks at the end of so many that are kept in bf16."""
        return (
            math.ceil(self.bf16_last_layers * num_blocks) if self.bf16_last_layers < 1 else int(self.bf16_last_layers)
        )

    def narrow_blocks(self, letters: tuple[str, ...]) -> tuple[int, ...]:
        """Indices of the blocks of a pattern's main part whose products use the recipe; MTP layers never do."""
        chosen, end = self.chosen(letters), len(letters) - self.wide_at_end(len(letters))
        return tuple(
            index for index, symbol in enumerate(letters) if symbol in chosen and self.bf16_first_layers <= index < end
        )

    def recipes_of(self, symbol: str) -> dict[str, RecipeName]:
        """Recipe of each weight of a narrow block of this kind that takes one, by its name below the mixer.

        Names of a table: a weight need not be there, such as those of a shared expert.
        """
        if self.recipe == "none":
            return {}
        inner, out = kind_of(symbol).products
        found: dict[str, RecipeName] = dict.fromkeys(inner, self.recipe)
        of_out = self.out_proj_recipe or ("mxfp8" if self.recipe == "nvfp4" else "same")
        if out is not None and of_out != "bf16":
            found[out] = self.recipe if of_out == "same" else of_out
        return found
