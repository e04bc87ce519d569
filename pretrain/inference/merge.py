"""Multiply factored matrices out: the same function as a dense model, which every class of other programs can hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from model.config.schema import ModelConfig
from model.config.structure import DENSE, Structure
from model.structured import dense_matrix
from pretrain.inference.weights import Weights


def factored_places(config: ModelConfig) -> Iterator[tuple[str, Structure]]:
    """Name each feed-forward with factored matrices by what its parameters begin with, and their form."""
    for index, letter in enumerate(config.letters):
        if letter == "-" and config.feed_forward is not None and config.feed_forward.structure() != DENSE:
            yield f"blocks.{index}.mixer.", config.feed_forward.structure()
        if letter == "E" and config.moe is not None and config.moe.shared_structure() != DENSE:
            yield f"blocks.{index}.mixer.shared.", config.moe.shared_structure()


def dense_config(config: ModelConfig) -> ModelConfig:
    """The configuration of the same sizes with dense matrices."""
    changes = {}
    plain = {"linear_kind": "dense", "linear_rank": None, "linear_blocks": None}
    if config.feed_forward is not None:
        changes["feed_forward"] = config.feed_forward.model_copy(update=plain)
    if config.moe is not None:
        shared = {f"shared_expert_{name}": value for name, value in plain.items()}
        changes["moe"] = config.moe.model_copy(update=shared)
    return config.model_copy(update=changes)


def merge_factors(weights: Weights) -> Weights:
    """Replace the factors by their products, computed in float64 and rounded once; a dense model is returned as it is."""
    places = list(factored_places(weights.model))
    if not places:
        return weights
    state: dict[str, Tensor] = dict(weights.state)
    for place, structure in places:
        for matrix in ("up_proj", "down_proj"):
            first, second = (state.pop(f"{place}{matrix}.{factor}") for factor in ("first", "second"))
            state[f"{place}{matrix}.weight"] = dense_matrix(structure, first.double(), second.double()).float()
    return replace(weights, model=dense_config(weights.model), state=state)
