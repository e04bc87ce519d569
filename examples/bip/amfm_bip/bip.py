"""Bi-level pruning (BiP, Zhang et al. 2022, arXiv 2210.04092) of whole groups; see the README for the two steps.

Masks multiply weights only while a loss is computed (`torch.func.functional_call`), so the model itself and its names stay.
Groups and how parameters divide among them are those of amfm's own pruning, and what `finish` leaves is what
`shrink_weights` removes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call

from amfm.model.hybrid import HybridModel
from amfm.pretrain.config.pruning import PrunedGroups
from amfm.pretrain.pruning.groups import GroupPlan, plan_groups
from amfm.pretrain.pruning.prune import choose_groups

# From a model that computes with masked weights to the loss of a batch: `lambda call: call(tokens, meta, labels).loss.total`.
Loss = Callable[[Callable[..., object]], Tensor]


class BipMasks:
    """Scores of a model's groups; the best `keep` of each block are in the mask. On one rank, which holds all weights."""

    def __init__(
        self,
        model: HybridModel,
        *,
        groups: PrunedGroups = "channels",
        keep: float,
        gamma: float = 1.0,
        rate: float = 0.1,
    ) -> None:
        if groups == "experts":
            raise ValueError("groups=experts leaves the router choosing what is masked; use channels or heads")
        if any(group.size() > 1 for group in (model.groups.tp, model.groups.ep, model.groups.pp)):
            raise ValueError("BiP got a model that is cut over ranks; use one rank of tensor, expert and pipeline")
        self.model, self.keep, self.gamma, self.rate = model, keep, gamma, rate
        self.plan: GroupPlan = plan_groups(model.config, groups)
        if not self.plan.units:
            raise ValueError(f"model.pattern={model.config.pattern} has no {groups}; use groups that it has")
        with torch.no_grad():
            # The first mask is that of magnitude.
            self.scores = self._sum_groups(
                {name: model.get_parameter(name).square() for name in self.plan.groupings}
            ).sqrt()

    def mask(self) -> Tensor:
        """1 for groups that stay, 0 for others, [groups] float64."""
        return 1.0 - choose_groups(self.plan, self.scores, 1 - self.keep).double()

    def masked_weights(self) -> dict[str, Tensor]:
        """Weights of the groups times their mask, by name; with gradients to the weights."""
        mask = self.mask()
        return {name: self.model.get_parameter(name) * self._spread(name, mask) for name in self.plan.groupings}

    def lower_step(self, loss: Loss, optimizer: torch.optim.Optimizer) -> float:
        """One step of all weights under the mask of now, with gamma / 2 times the squares of grouped weights; the loss."""
        weights = self.masked_weights()
        value = loss(self._call(weights))
        grouped = sum(self.model.get_parameter(name).square().sum() for name in weights)
        (value + 0.5 * self.gamma * grouped).backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(value.detach())

    def upper_step(self, loss: Loss) -> Tensor:
        """One step of the scores on another batch; returns the gradient of the masks, [groups] float64."""
        weights = {name: weight.detach().requires_grad_() for name, weight in self.masked_weights().items()}
        gradients = dict(zip(weights, torch.autograd.grad(loss(self._call(weights)), list(weights.values()))))
        with torch.no_grad():
            straight = self._sum_groups({name: self.model.get_parameter(name) * g for name, g in gradients.items()})
            # How the trained weights answer a mask, with 1 / gamma for the inverse of their loss's curvature.
            answered = self.mask() * self._sum_groups({name: g.square() for name, g in gradients.items()})
            gradient = straight - answered / self.gamma
            self.scores -= self.rate * gradient
        return gradient

    @torch.no_grad()
    def finish(self) -> int:
        """Set masked groups to zero in the model itself; returns how many."""
        for name, weight in self.masked_weights().items():
            self.model.get_parameter(name).copy_(weight)
        return int((self.mask() == 0).sum())

    def _call(self, weights: dict[str, Tensor]) -> Callable[..., object]:
        return lambda *args, **kwargs: functional_call(self.model, weights, args, kwargs)

    def _groups_of(self, name: str) -> Tensor:
        """Group of each index along the grouped dim."""
        grouping = self.plan.groupings[name]
        return grouping.groups_at(torch.arange(self.model.get_parameter(name).shape[grouping.dim]))

    def _spread(self, name: str, mask: Tensor) -> Tensor:
        """Lay the mask over a parameter: [size, 1] or [1, size]."""
        weight, dim = self.model.get_parameter(name), self.plan.groupings[name].dim
        return mask[self._groups_of(name)].to(weight).unsqueeze(1 - dim)

    def _sum_groups(self, values: dict[str, Tensor]) -> Tensor:
        """Sum values laid out as parameters by group, [groups] float64."""
        sums = torch.zeros(self.plan.num_groups, dtype=torch.float64)
        for name, value in values.items():
            by_index = value.double().sum(1 - self.plan.groupings[name].dim)
            sums.index_add_(0, self._groups_of(name), by_index.cpu())
        return sums
