"""Low-rank updates next to projections of mixers: put in before a fine-tune, merged into the weights after it.

The update is a module `lora` of the layer next to it, so that all other weights keep their names: weights without it
load into a model before it gets one, and `merge_lora` gives back a state with exactly the names of such a model. What is
frozen is said only by `requires_grad`; engine and checkpoints go by that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

from torch import Tensor

from amfm.model.hybrid import HybridModel
from amfm.model.init import initialize_parameters
from amfm.model.on_demand import OnDemand, computed, on_demand
from amfm.model.parallel.layers import LowRankUpdate
from amfm.model.routed_updates import PROJECTIONS, projections_of

__all__ = ["PROJECTIONS", "add_lora", "merge_lora"]

_DOWN, _UP = ".lora.down", ".lora.up"


def add_lora(model: HybridModel, targets: Collection[str], *, rank: int, alpha: float) -> list[str]:
    """Put an update of this rank, times alpha / rank, next to the projections `targets` (q, k, v, o, in, out) of every
    mixer with them.

    Updates start at zero: the model computes what it did. Returns the names of the layers that got one. No collectives;
    every rank must call this before an engine takes the model.
    """
    found = []
    for index in model.blocks.indices():
        for name, layer in projections_of(model.blocks[index].mixer, tuple(targets)).items():
            (cut,) = layer.shards["weight"].cuts
            layer.lora = LowRankUpdate(layer.weight, cut, rank, alpha / rank)
            found.append(f"blocks.{index}.mixer.{name}")
    initialize_parameters(
        model, model.config, model.groups, model.seed, wanted=lambda name: name.endswith((_DOWN, _UP))
    )
    return found


def merge_lora(state: Mapping[str, Tensor], scale: float) -> OnDemand:
    """Add scale up down to each weight that has an update, in float64, and leave the factors out: whole tensors by name."""
    given = on_demand(state)
    merged = given.without(lambda name: name.endswith((_DOWN, _UP)))
    for name in given:
        if name.endswith(_DOWN):
            layer = name.removesuffix(_DOWN)
            source = given.sources[f"{layer}.weight"]
            merged.sources[f"{layer}.weight"] = computed(
                source.shape, source.dtype, partial(_merge_layer, given, layer, scale)
            )
    return merged


def _merge_layer(state: OnDemand, layer: str, scale: float) -> Tensor:
    weight_OI = state[f"{layer}.weight"]
    update_OI = scale * (state[f"{layer}{_UP}"].double() @ state[f"{layer}{_DOWN}"].double())
    return (weight_OI.double() + update_OI).to(weight_OI.dtype)
