"""The weighted mean of models, read and computed some rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from amfm.model.moe.block import PRUNED_BIAS
from amfm.model.on_demand import OnDemand, Source, on_demand
from amfm.pretrain.inference.weights import Weights

EXPERT_BIAS = ".expert_bias"


def average(parts: Sequence[Weights], shares: Sequence[float]) -> Weights:
    """The weighted mean of models, summed in float64 and rounded once, computed when it is asked for.

    Positions, tokens and the tokenizer are those of the part after the most steps. Raises ValueError if tensors differ in
    name or shape.
    """
    newest = max(parts, key=lambda part: part.step or 0)
    states = [on_demand(part.state) for part in parts]
    wanted = on_demand(newest.state)
    for part, state in zip(parts, states):
        shapes = [{name: each.shape(name) for name in each} for each in (state, wanted)]
        differing = sorted(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name))
        if differing:
            name = differing[0]
            raise ValueError(
                f"{part.origin} and {newest.origin} hold other tensors: {name} is {shapes[0].get(name, 'absent')} and "
                f"{shapes[1].get(name, 'absent')} ({len(differing)} differ); merge checkpoints of one model"
            )
    sources = {
        name: Source(
            source.shape, source.dtype, partial(_rows, [state.sources[name] for state in states], shares, name)
        )
        for name, source in wanted.sources.items()
    }
    origin = f"merge of {', '.join(part.origin for part in parts)} by {', '.join(f'{share:.4g}' for share in shares)}"
    return replace(newest, state=OnDemand(sources), origin=origin, validation_loss=None)


def _rows(sources: Sequence[Source], shares: Sequence[float], name: str, start: int, stop: int) -> Tensor:
    """Rows of the mean of a tensor. An expert that one part has pruned stays pruned: its bias is a mark, no number."""
    total: Tensor | None = None
    is_pruned: Tensor | None = None
    for source, share in zip(sources, shares):
        rows = source.read(start, stop)
        if not rows.is_floating_point():
            raise ValueError(f"{name} holds {rows.dtype}, which have no mean")
        if name.endswith(EXPERT_BIAS):
            marked = rows <= PRUNED_BIAS / 2
            is_pruned = marked if is_pruned is None else is_pruned | marked
        total = rows.double().mul_(share) if total is None else total.add_(rows.double(), alpha=share)
    assert total is not None, "there is a part"
    mean = total.float()
    return mean if is_pruned is None else torch.where(is_pruned, PRUNED_BIAS, mean)
