"""Maestro (Horvath et al. 2023, arXiv 2308.14929) on amfm's low-rank feed-forwards: ranks that order themselves, then end early.

A mask on the leading components is a parametrization of each first factor, and a step is told to it as to every module
with `set_step` (model/scheduled.py): a function of the seed and the step, the same on all ranks, nothing to save.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from amfm.model.config.checks import check_model
from amfm.model.hybrid import HybridModel
from amfm.model.structured import StructuredLinear


class LeadingComponents(nn.Module):
    """The first factor [r, in] with all but its leading rows at zero, in steps that are this layer's."""

    def __init__(self, rank: int, number: int, count: int) -> None:
        super().__init__()
        self.rank, self.number, self.count, self.leading = rank, number, count, rank

    def set_step(self, step: int, total_steps: int, seed: int) -> None:
        """Draw one of all layers and its rank, 1 to r, each alike likely; the others compute with all components."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        layer = int(torch.randint(self.count, (), generator=generator))
        drawn = 1 + int(torch.randint(self.rank, (), generator=generator))
        self.leading = drawn if layer == self.number else self.rank

    def forward(self, first_RI: Tensor) -> Tensor:
        """Mask; nothing outside of training."""
        if not self.training or self.leading == self.rank:
            return first_RI
        is_leading_R = torch.arange(self.rank, device=first_RI.device) < self.leading
        return first_RI * is_leading_R[:, None]


def add_maestro(model: HybridModel) -> int:
    """Let every low-rank layer of a model draw ranks; returns their number. Raises ValueError where there is none."""
    layers = list(low_rank_layers(model))
    if not layers:
        raise ValueError("the model has no low-rank layers; use model.feed_forward.linear_kind: lowrank")
    if any(layer.guide is not None for layer in layers):
        raise ValueError(
            "model.guide holds each layer to a dense matrix, and Maestro orders its ranks; remove one of them"
        )
    if model.groups.tp.size() > 1:
        raise ValueError("Maestro got layers cut over tensor ranks, and cuts whole ones; use parallel.tensor=1")
    for number, layer in enumerate(layers):
        rank = layer.first.shape[0]
        parametrize.register_parametrization(layer, "first", LeadingComponents(rank, number, len(layers)))
    return len(layers)


def tail_penalty(model: HybridModel) -> Tensor:
    """Sum over layers and b of |first from row b on| + |second from column b on|: the group lasso that empties tails."""
    total = torch.zeros((), device=next(model.parameters()).device)
    for layer in low_rank_layers(model):
        for squares_R in (whole_first(layer).square().sum(1), layer.second.square().sum(0)):
            tails_R = squares_R.flip(0).cumsum(0)
            # The root has no slope at zero, and a tail that is gone asks for none.
            total = total + torch.where(tails_R > 0, tails_R, 1.0).sqrt().mul(tails_R > 0).sum()
    return total


@torch.no_grad()
def cut_ranks(model: HybridModel, threshold: float) -> tuple[HybridModel, list[int]]:
    """A model of the rank that the layers still need, with the weights of this one, and the rank that each needs.

    A component counts where its size |first row| |second column| is at least `threshold` times its layer's largest. The
    configuration has one rank for all layers, so the largest of what they need decides.
    """
    ranks = []
    for layer in low_rank_layers(model):
        sizes = whole_first(layer).norm(dim=1) * layer.second.norm(dim=0)
        ranks.append(1 + int((sizes >= threshold * sizes.max()).nonzero().max()))
    rank, config = max(ranks), model.config
    assert config.feed_forward is not None, "it has low-rank layers"
    section = config.feed_forward.model_copy(update={"linear_rank": rank})
    smaller = config.model_copy(update={"feed_forward": section})
    check_model(smaller)
    cut = HybridModel(smaller, model.groups, backend=model.backend, seed=model.seed).to(next(model.parameters()))
    state = model.state_dict()
    for name, tensor in cut.state_dict().items():
        place, _, own = name.rpartition(".")
        given = state[name] if name in state else state[f"{place}.parametrizations.{own}.original"]
        tensor.copy_(given[tuple(slice(size) for size in tensor.shape)])
    return cut, ranks


def low_rank_layers(model: HybridModel) -> Iterator[StructuredLinear]:
    """Iterate over the layers of two low-rank factors."""
    for module in model.modules():
        if isinstance(module, StructuredLinear) and module.structure.kind == "lowrank":
            yield module


def whole_first(layer: StructuredLinear) -> Tensor:
    """The first factor without a mask."""
    return layer.parametrizations["first"].original if parametrize.is_parametrized(layer, "first") else layer.first
