"""Tokens, batch and learning rate of a model by published laws, each with its source and the range that it was measured in.

None of them was fitted to hybrids at these sizes. docs/scaling.md has what `amfm study rate` and `amfm study ladder` measured on
hybrids of 0.1M to 0.4M active parameters, and how the laws compare. Outside of its range a law is an extrapolation, which `amfm
init --depth` writes into the file and prints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from amfm.launch.init.shapes import Size, dial_size, model_section
from amfm.model.config.schema import ModelConfig
from amfm.model.flops import Counts, count_parameters

TOKENS_PER_PARAMETER = 20
LEAST_BATCH, LEAST_STEPS = 8, 200  # sequences; steps
# The best rate of hybrids of 0.1M parameters (docs/scaling.md); small models of many tokens would get ten times that.
HIGHEST_RATE = 8e-3


@dataclass(frozen=True)
class Law:
    """A power law of parameters N and tokens D: factor * N^parameters * D^tokens; ranges are inclusive."""

    name: str
    text: str
    source: str
    factor: float
    parameters: float
    tokens: float
    n_range: tuple[float, float]
    d_range: tuple[float, float]

    def __call__(self, n: float, d: float) -> float:
        """The law's value."""
        return float(self.factor * n**self.parameters * d**self.tokens)

    def warnings(self, n: float, d: float) -> Iterator[str]:
        """A sentence for each of N and D that is out of range."""
        for what, value, (low, high) in (("N", n, self.n_range), ("D", d, self.d_range)):
            if not low <= value <= high:
                yield f"{self.name}: {what} = {value:.2g} is outside of {low:.2g} to {high:.2g}, where it was measured"


EVERYTHING = (0.0, math.inf)
# D = 20 N at the lowest loss for the compute. N: all parameters that a token passes.
TOKENS = Law(
    "tokens",
    f"D = {TOKENS_PER_PARAMETER} N, N the active parameters",
    "Hoffmann et al. 2022, arXiv 2203.15556, table 3; dense transformers",
    TOKENS_PER_PARAMETER,
    1.0,
    0.0,
    (7e7, 1.6e10),
    EVERYTHING,
)
_STEP_LAW = "Li et al. 2025, arXiv 2503.04715; dense transformers and mixtures of experts"
# N without embedding and head; of experts those that a token passes.
BATCH = Law(
    "batch",
    "0.58 D^0.571 tokens",
    _STEP_LAW,
    0.58,
    0.0,
    0.571,
    EVERYTHING,
    (2e9, 1e11),
)
RATE = Law(
    "learning rate",
    "1.79 N^-0.713 D^0.307, N the active parameters without embedding and head",
    _STEP_LAW,
    1.79,
    -0.713,
    0.307,
    (6e7, 1e9),
    (2e9, 1e11),
)
LAWS = (TOKENS, BATCH, RATE)


@dataclass(frozen=True)
class Recipe:
    """A model of one depth and the run that the laws give it; N and D as the laws read them, and what is extrapolated."""

    size: Size
    active: float
    body: float
    tokens: float
    warnings: tuple[str, ...]


def recipe_of(depth: int, style: str, vocab_size: int | None = None, sequence_length: int | None = None) -> Recipe:
    """Everything that follows from a depth. `vocab_size`, `sequence_length`: others than those of the width.

    Raises ValueError for a depth that makes no model.
    """
    shape = dial_size(depth)
    width = shape.hidden_size
    vocabulary, length = (16_384, 1024) if width < 512 else (32_768, 2048) if width < 1024 else (65_536, 4096)
    shape = replace(shape, vocab_size=vocab_size or vocabulary, sequence_length=sequence_length or length)
    counts = count_parameters(ModelConfig.model_validate(model_section(f"d{depth}", style, shape)))
    active, body = float(counts.active), body_of(counts)
    tokens = TOKENS(active, 1)
    rows = max(LEAST_BATCH, 2 ** round(math.log2(BATCH(body, tokens) / shape.sequence_length)))
    steps = max(LEAST_STEPS, math.ceil(tokens / (rows * shape.sequence_length)))
    size = replace(
        shape,
        global_batch_size=rows,
        steps=steps,
        learning_rate=min(HIGHEST_RATE, float(f"{RATE(body, tokens):.2g}")),
        warmup_steps=steps // 20,
    )
    warnings = [*TOKENS.warnings(active, tokens), *BATCH.warnings(body, tokens), *RATE.warnings(body, tokens)]
    return Recipe(size, active, body, tokens, tuple(warnings))


def body_of(counts: Counts) -> float:
    """Active parameters without embedding and head."""
    return float(counts.active - counts.active_by_kind["embedding"] - counts.active_by_kind["head"])
