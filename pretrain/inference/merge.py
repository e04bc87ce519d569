"""Multiply factored matrices out: the same function as a dense model, which every class of other programs can hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from amfm.model.config.schema import ModelConfig
from amfm.model.config.structure import DENSE, Structure
from amfm.model.on_demand import OnDemand, computed, on_demand
from amfm.model.structured import dense_matrix


def multiply_out(model: ModelConfig, state: Mapping[str, Tensor], alpha: float = 0.0) -> tuple[ModelConfig, OnDemand]:
    """Replace factors by their products, computed in float64 and rounded once: the dense configuration and its weights.

    A product is computed when it is asked for. `alpha`: weight of the guides among the weights, where there are any. A
    dense model comes back as it was.
    """
    given = on_demand(state)
    merged = OnDemand(given.sources)
    for place, structure in factored_places(model):
        for matrix in ("up_proj", "down_proj"):
            own = f"{place}{matrix}"
            for part in ("first", "second", "guide_weight"):
                merged.sources.pop(f"{own}.{part}", None)
            factors = (torch.empty(given.shape(f"{own}.{factor}"), device="meta") for factor in ("first", "second"))
            shape = tuple(dense_matrix(structure, *factors).shape)
            make = partial(_multiply, given, own, structure, alpha)
            merged.sources[f"{own}.weight"] = computed(shape, torch.float32, make)
    return dense_config(model), merged


def _multiply(state: OnDemand, place: str, structure: Structure, alpha: float) -> Tensor:
    """The matrix that two factors stand for, with its guide where it has one."""
    product = dense_matrix(structure, state[f"{place}.first"].double(), state[f"{place}.second"].double())
    if f"{place}.guide_weight" in state:
        product = alpha * state[f"{place}.guide_weight"].double() + (1 - alpha) * product
    return product.float()


def factored_places(config: ModelConfig) -> Iterator[tuple[str, Structure]]:
    """Map the prefix of each feed-forward with factored matrices to the form of its factors."""
    for place, symbol in mixer_places(config):
        for part in config.block_options(symbol).feed_forwards():
            if part.structure != DENSE:
                yield f"{place}{part.place}", part.structure


def mixer_places(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """What the parameters of each mixer begin with, and its letter: main blocks, then those of multi-token prediction."""
    depths = config.parsed_pattern.depth_letters
    modules = [("", config.letters), *((f"mtp.{depth}.", depths) for depth in range(config.num_depth_modules))]
    for prefix, letters in modules:
        for index, symbol in enumerate(letters):
            yield f"{prefix}blocks.{index}.mixer.", symbol


def dense_config(config: ModelConfig) -> ModelConfig:
    """The configuration of the same sizes with dense matrices; one that has no factors is returned as it is."""
    if not config.has_factors():
        return config
    for kind, options in config.sections():
        for part in options.feed_forwards():
            options = options.model_copy(update=part.dense_settings())
        config = config.with_options(kind, options)
    return config
