"""How the products of one weight take their operands in 8 or 4 bits: a description that the model hangs on the weight.

A weight without one is multiplied as it always was. `weight.recipe = Recipe("fp8_block")` is all that a model does; operations
that multiply by weights (`kernels/linear`, `kernels/moe`) look for it in the forward pass (`recipe_of`) and keep it for the
backward pass, because what a recomputed block saves are copies of its parameters.

Nothing of a recipe changes from step to step: all scales are functions of the tensor available, and so are the random
numbers of nvfp4, which are drawn from the recipe's seed and the bits of what is rounded (`formats.draw_noise`). So a
checkpoint holds nothing of it, and a block that is computed again, in whatever order a pipeline does so, rounds as it
did before.

Someone who looks, now and then, at the operands that products quantise.

Products tell each of their wide operands here before they quantise it, and no one listens but inside `watch_operands`.
A listener tells weights apart by the seeds of their recipes. A list and no context variable: autograd runs backward
passes in separate threads.

Codes of weights that are made once per step and kept for all its passes.

A weight is quantised wherever a product reads it: 3 bytes a number for each product of each micro-batch, which for experts with
few rows takes longer than the products. Between the first forward pass of a step and its update weights stay as they are. Who
knows when that is opens `keep_weights` around it; inside, a weight is quantised the first time, in both directions (2 bytes a
number of FP8), and kept until the block ends. Outside of such a block nothing is kept.

A weight is known by its memory, because what a recomputed block gets are copies of its parameters. Blocks do not nest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args

from torch import Tensor

RecipeName = Literal["fp8_block", "mxfp8", "nvfp4"]
NAMES: tuple[RecipeName, ...] = get_args(RecipeName)
# The first compute capability whose tensor cores take a recipe's operands.
FIRST_CAPABILITY: Mapping[RecipeName, tuple[int, int]] = MappingProxyType(
    {"fp8_block": (9, 0), "mxfp8": (10, 0), "nvfp4": (10, 0)}
)
# What both widths of a matrix must be a multiple of where a GPU multiplies by it; emulated, any width will do.
WIDTH_MULTIPLE: Mapping[RecipeName, int] = MappingProxyType({"fp8_block": 16, "mxfp8": 32, "nvfp4": 32})


@dataclass(frozen=True)
class Recipe:
    """How one weight is multiplied, in all three products: the output, the gradient of the input, that of the weight.

    `name`: fp8_block, e4m3 in blocks of 128 (DeepSeek-V3, arXiv 2412.19437, section 3.3); mxfp8, e4m3 in blocks of 32 (OCP MX 1.0);
    nvfp4, e2m1 in blocks of 16 (Abecassis et al. 2025, arXiv 2509.25149). `weight_gradient`: "bf16" takes the third product from
    the operands as they came. `saved`: "fp8" keeps hidden rows of experts and feed-forwards before the activation as e4m3 in blocks of
    128 along the row. `dispatch`: "fp8" sends rows to an expert's rank, and gradients of its results, as such codes (packed_rows.py). `emulate`: quantise, then multiply wide, on any device. `seed`: of nvfp4's random rounding, `seed_of` of the run's
    seed and the weight's name.
    """

    name: RecipeName
    weight_gradient: Literal["same", "bf16"] = "same"
    saved: Literal["bf16", "fp8"] = "bf16"
    dispatch: Literal["bf16", "fp8"] = "bf16"
    emulate: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"a recipe's name must be one of {', '.join(NAMES)}; got {self.name!r}")


def recipe_of(weight: Tensor | None) -> Recipe | None:
    """How this weight is multiplied; None: as it is."""
    found: Recipe | None = getattr(weight, "recipe", None)
    return found


@dataclass(frozen=True)
class ExpertRecipes:
    """How experts' up and down are multiplied: alike but for their seeds."""

    up: Recipe
    down: Recipe


def recipes_of(up_EFD: Tensor, down_EDF: Tensor) -> ExpertRecipes | None:
    """The recipes of both weights, None if they have none. Raises ValueError if they differ in more than their seeds."""
    up, down = recipe_of(up_EFD), recipe_of(down_EDF)
    if up is None and down is None:
        return None
    if up is None or down is None or replace(up, seed=0) != replace(down, seed=0):
        raise ValueError(f"experts' up and down must have the same recipe, or none; got {up} and {down}")
    return ExpertRecipes(up, down)


def seed_of(seed: int, name: str) -> int:
    """A seed below 2^31 for one weight, out of the run's and the weight's name: the same on all ranks."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "little") >> 1


Role = Literal["input", "gradient", "weight"]
Listener = Callable[[Recipe, Role, Tensor], None]

_listeners: list[Listener] = []


@contextmanager
def watch_operands(listener: Listener) -> Iterator[None]:
    """Inside the block call `listener(recipe, role, matrix)` with each operand of a product by a recipe.

    Inputs and weights come in forward passes, also of blocks that are computed again, gradients in backward passes.
    """
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def is_watched() -> bool:
    """Whether there is a listener: then operands are made wide that else are only made as codes."""
    return bool(_listeners)


def note_operands(recipe: Recipe, **operands: Tensor) -> None:
    """Tell listeners of the wide operands of a product, by their roles."""
    for listener in _listeners:
        for role, matrix in operands.items():
            listener(recipe, role, matrix)  # type: ignore[arg-type]


Made = TypeVar("Made")

# Inside a block, one dictionary: what was made by the memory of a weight, which is held so that no other takes its place.
_blocks: list[dict[tuple[Any, ...], tuple[Tensor, Any]]] = []


@contextmanager
def keep_weights() -> Iterator[None]:
    """Inside the block, in which no weight with a recipe may change, each is quantised once."""
    assert not _blocks, "weights are kept already"
    kept: dict[tuple[Any, ...], tuple[Tensor, Any]] = {}
    _blocks.append(kept)
    try:
        yield
    finally:
        _blocks.remove(kept)


def keeps_weights() -> bool:
    """Whether what is made of a weight now will be kept."""
    return bool(_blocks)


def made_once(weight: Tensor, what: str, make: Callable[[], Made]) -> Made:
    """What `make` makes of a weight, `what` telling apart several of one weight; kept inside `keep_weights`."""
    if not _blocks:
        return make()
    kept = _blocks[-1]
    storage = weight.untyped_storage()._cdata
    key = (storage, weight.storage_offset(), tuple(weight.shape), weight.stride(), weight.dtype, what)
    if key not in kept:
        kept[key] = weight.detach(), make()
    found: Made = kept[key][1]
    return found
