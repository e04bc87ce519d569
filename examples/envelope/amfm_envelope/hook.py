"""The proximal steps of a k-level envelope on group norms; see the README for the formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from amfm.model.shapes import weight_shapes
from amfm.pretrain.checkpoint.engine_layout import MasterView
from amfm.pretrain.hook import Hook
from amfm.pretrain.hooks.prune import GroupPlan, choose_groups, plan_groups
from amfm.pretrain.run import Run
from amfm.pretrain.step_sums import StepResult
from amfm_envelope.spec import EnvelopeOptions

HALVINGS = 80  # of an interval of float64 numbers


class EnvelopeHook(Hook):
    """Shrinks groups towards the largest of each block, or of the model, while the penalty rises; then the others go to zero."""

    def __init__(self, options: EnvelopeOptions, run: Run) -> None:
        self.options, self.run = options, run
        self.plan = GroupPlan()
        for kind in options.kinds():
            for unit in plan_groups(run.config.model, kind).units:
                self.plan.add(unit.place.removesuffix(unit.groups.place), unit.letter, unit.groups)
        self.costs = count_weights(self.plan, weight_shapes(run.config.model))
        # Norms compete within a block, or, in units of weights, in the whole model.
        self.budgets = [slice(unit.first, unit.first + unit.count) for unit in self.plan.units]
        if options.budget == "weights":
            self.budgets = [slice(0, self.plan.num_groups)]
        # What a group counts in the penalty: its share of its budget, 1 on average.
        self.prices = torch.cat([self.costs[own] / self.costs[own].mean() for own in self.budgets])

    def after_step(self, result: StepResult) -> None:
        """Shrink, or choose, if the step is one for it; nothing before and after."""
        options, step = self.options, self.run.progress.step
        is_due = (step - options.start_step) % options.every_steps == 0 or step == options.end_step
        if not options.start_step <= step <= options.end_step or not is_due:
            return
        edited = self.edit(self.run.open_masters(), step)
        self.run.note_edit()
        words = ", ".join(f"{key} {value}" for key, value in edited.items())
        self.run.tell("hook", f"step {step}: envelope: {words}", name="envelope", **edited)

    def edit(self, view: MasterView, step: int) -> dict[str, int]:
        """Shrink the groups, or leave only the largest at the last step; returns what was done to how many."""
        options = self.options
        squares = view.sum_groups(self.plan.groupings, self.plan.num_groups)
        if step == options.end_step:
            chosen = self.choose(squares)
            view.zero_groups(self.plan.groupings, chosen)
            left = round(100 * float(self.costs[~chosen].sum() / self.costs.sum()))
            return {"zero": int(chosen.sum()), "of": self.plan.num_groups, "percent_of_weights_left": left}
        done = (step - options.start_step + 1) / (options.end_step - options.start_step)
        factors = torch.ones_like(squares)
        for own in self.budgets:
            prices = self.prices[own]
            budget = options.keep * float(prices.sum())
            factors[own] = shrink_factors(squares[own].sqrt(), prices, budget, done * options.strength)
        view.scale_groups(self.plan.groupings, factors)
        return {"shrunk": int((factors < 1).sum()), "of": self.plan.num_groups}

    def choose(self, squares: Tensor) -> Tensor:
        """Choose the groups that go to zero, [groups] bool, those that the penalty shrinks most first."""
        if self.options.budget == "groups":
            return choose_groups(self.plan, squares, 1 - self.options.keep)
        order = (squares / self.prices).sqrt()
        first = torch.zeros(self.plan.num_groups, dtype=torch.bool)
        for unit in self.plan.units:  # a block without any group would be none
            first[unit.first + order[unit.first : unit.first + unit.count].argmax()] = True
        left = self.options.keep * float(self.costs.sum()) - float(self.costs[first].sum())
        chosen = ~first
        for group in order.argsort(descending=True, stable=True).tolist():
            if chosen[group] and self.costs[group] <= left:
                chosen[group] = False
                left -= float(self.costs[group])
        return chosen


def count_weights(plan: GroupPlan, shapes: Mapping[str, Sequence[int]]) -> Tensor:
    """Count the weights of each group of a plan, [groups] float64, from the shapes of whole parameters by name."""
    counts = torch.zeros(plan.num_groups, dtype=torch.float64)
    for name, grouping in plan.groupings.items():
        shape = shapes[name]
        each = math.prod(shape) / shape[grouping.dim]
        counts += each * torch.bincount(grouping.groups_at(torch.arange(shape[grouping.dim])), minlength=len(counts))
    return counts


def envelope_shares(norms: Tensor, prices: Tensor, budget: float, strength: float) -> Tensor:
    """u [n] in [0, 1] with sum of prices_i u_i = budget: u_i = clip(c z_i / sqrt(prices_i) - strength, 0, 1), c by halving.

    For budgets below the sum of prices. Groups of zero norm get nothing, and what then is left over no one gets.
    """
    sizes = norms / prices.sqrt()
    low, high = torch.zeros((), dtype=norms.dtype), (1 + strength) / sizes[sizes > 0].min()
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        is_less = (prices * (middle * sizes - strength).clamp(0, 1)).sum() < budget
        low, high = (middle, high) if is_less else (low, middle)
    return (high * sizes - strength).clamp(0, 1)


def proximal_step(norms: Tensor, prices: Tensor, budget: float, strength: float) -> Tensor:
    """The x that minimise |x - z|^2 / 2 + strength / 2 min over u of sum x_i^2 / u_i, sum of prices_i u_i = budget, u <= 1."""
    shares = envelope_shares(norms, prices, budget, strength)
    return norms * shares / (shares + strength)


def shrink_factors(norms: Tensor, prices: Tensor, budget: float, strength: float) -> Tensor:
    """What each group is multiplied by: the proximal step, without what it takes off every kept group alike."""
    if not (norms > 0).any():
        return torch.ones_like(norms)
    shares = envelope_shares(norms, prices, budget, strength)
    return shares * (1 + strength) / (shares + strength)
