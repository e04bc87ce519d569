"""Which weights of a model make their products by a recipe of low precision, and how the products learn of it.

Pattern and settings decide (model/config/low_precision.py), and a recipe hangs on its weight as an attribute, as its gradient
sum does: an operation that multiplies by a weight asks the weight (kernels/low_precision/recipe.py). So neither blocks nor
mixers know of recipes, nothing is saved, and a model on which none hangs computes as before, bitwise and to the launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

from amfm.kernels.low_precision.recipe import Recipe, recipe_of, seed_of
from amfm.model.block import Block
from amfm.model.build import sample_mixer
from amfm.model.config.low_precision import LowPrecisionConfig, RecipeName
from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.shards import Shard, parameter_shards


class Matrix(NamedTuple):
    """A weight of a mixer that has rows and columns: its name below the mixer, whole shape, and how ranks cut it."""

    name: str
    shape: tuple[int, ...]
    shard: Shard


class PrecisionRow(NamedTuple):
    """Weights of one name in the blocks of one kind that make their products alike; `blocks`: their indices.

    precision: a recipe, or that of the run. numel: numbers of one of them.
    """

    kind: str
    weight: str
    precision: str
    blocks: tuple[int, ...]
    numel: int


@lru_cache(maxsize=256)
def list_matrices(config: ModelConfig, symbol: str) -> tuple[Matrix, ...]:
    """The weights of a kind of block with rows and columns, of a mixer that is built without storage. No collectives."""
    mixer = sample_mixer(config, symbol)
    return tuple(
        Matrix(name, tuple(weight.shape), shard) for name, weight, shard in parameter_shards(mixer) if weight.dim() > 1
    )


def narrow_matrices(
    config: ModelConfig, settings: LowPrecisionConfig, symbol: str
) -> Iterator[tuple[Matrix, RecipeName]]:
    """The weights of a narrow block of this kind that take a recipe, with it."""
    recipes = settings.recipes_of(symbol)
    for matrix in list_matrices(config, symbol):
        if matrix.name in recipes:
            yield matrix, recipes[matrix.name]


def attach_recipes(model: HybridModel, settings: LowPrecisionConfig) -> None:
    """Hang its recipe on each weight held here that takes one, in place of what hangs there. No collectives.

    Without a recipe nothing hangs anywhere. A seed is of the weight's name in the whole model, so random rounding does not depend on the layout of ranks.
    """
    letters = model.config.letters
    for weight in model.parameters():
        if recipe_of(weight) is not None:
            del weight.recipe  # type: ignore[attr-defined]
    for block in model.blocks:
        block.keeps_norm = True
    for index in set(settings.narrow_blocks(letters)) & set(model.blocks.indices()):
        attach_to_block(model.blocks[index], settings, model.seed, f"blocks.{index}.mixer.")


def attach_to_block(
    block: Block, settings: LowPrecisionConfig, seed: int = 0, prefix: str = ""
) -> list[torch.nn.Parameter]:
    """Hang recipes on the weights of a narrow block; returns those. `prefix`: of their names in the whole model."""
    block.keeps_norm = settings.activation_storage == "bf16"
    weights = dict(block.mixer.named_parameters())
    found = [(name, recipe) for name, recipe in settings.recipes_of(block.letter).items() if name in weights]
    for name, recipe in found:
        weights[name].recipe = Recipe(  # type: ignore[attr-defined]
            recipe,
            weight_gradient=settings.weight_gradient,
            saved=settings.activation_storage,
            dispatch=settings.dispatch,
            emulate=settings.emulate,
            seed=seed_of(seed, prefix + name),
        )
    return [weights[name] for name, _ in found]


def precision_table(config: ModelConfig, settings: LowPrecisionConfig, precision: str) -> list[PrecisionRow]:
    """What every matrix of the blocks makes its products in, rows in the order of the pattern; `precision`: the run's."""
    narrow, letters = frozenset(settings.narrow_blocks(config.letters)), config.built_letters
    rows = []
    for symbol in dict.fromkeys(letters):
        recipes = settings.recipes_of(symbol)
        indices = [index for index, each in enumerate(letters) if each == symbol]
        for matrix in list_matrices(config, symbol):
            numel = torch.Size(matrix.shape).numel()
            groups: dict[str, list[int]] = {}
            for index in indices:
                own = recipes.get(matrix.name, precision) if index in narrow else precision
                groups.setdefault(own, []).append(index)
            rows += [PrecisionRow(symbol, matrix.name, own, tuple(found), numel) for own, found in groups.items()]
    return rows


def describe_indices(indices: tuple[int, ...]) -> str:
    """Write numbers of blocks briefly: 0-12, 14; of every second one 0, 2, ..., 24."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index - runs[-1][-1] == 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    words = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(words) if len(words) <= 12 else f"{', '.join(words[:3])}, ..., {words[-1]}"
