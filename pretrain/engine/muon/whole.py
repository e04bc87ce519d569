"""One step of whole matrices by a rule: kinds of Muon and optimizers of packages.

Weights and gradients are sent to the owners of their matrices (exchange.py) in the dtype of the master weights, and new weights come back.
Tensor ranks that hold slices gather the matrix, and each computes all of it, alike. The rule's state is with the owner, so ZeRO
spreads it, and without ZeRO no rank keeps what another one owns.

Checkpoints hold the state among buffers, a tensor for each matrix and name: `optimizer/PARAMETER/NUMBER/NAME`, NUMBER counting the
matrices of the whole parameter. So a run moves between layouts whoever owns what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amfm.model.matrices import MatrixStack
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.pretrain.config.muon import MuonConfig
from amfm.pretrain.config.optimizers import PackageMatrices
from amfm.pretrain.engine.moments import OWNED
from amfm.pretrain.engine.muon.exchange import MatrixExchange, alike_batches, join
from amfm.pretrain.engine.muon.newton_schulz import gather_rows, own_rows
from amfm.pretrain.engine.muon.rules import Rule, find_rule
from amfm.pretrain.engine.parts import Part


@dataclass(frozen=True)
class Batch:
    """Stacks that are alike, with their places among the owned numbers, and their state by name, [N, *shape]."""

    members: list[tuple[MatrixStack, int]]
    state: dict[str, Tensor]


class WholeStep:
    """One step of the tensors that are handed over together, by a rule."""

    def __init__(
        self, parts: list[Part], stacks: Sequence[MatrixStack], groups: ProcessGroupCollection, rule: Rule
    ) -> None:
        self.parts, self.groups, self.rule = parts, groups, rule
        self.exchange = MatrixExchange(parts, stacks)
        master = parts[0].master
        self.batches: list[Batch] = []
        for members in alike_batches(self.exchange):
            count = sum(stack.count for stack, _ in members)
            shapes = rule.shapes(*members[0][0].shape)
            state = {name: master.new_zeros(count, *shape) for name, shape in shapes.items()}
            self.batches.append(Batch(members, state))

    def owned_states(self) -> dict[str, Tensor]:
        """The state of this rank's matrices, by the name that it has in checkpoints; views."""
        found: dict[str, Tensor] = {}
        for batch in self.batches:
            numbers = [(stack.name, stack.first + n) for stack, _ in batch.members for n in range(stack.count)]
            for name, values in batch.state.items():
                found |= {
                    f"{OWNED}{parameter}/{number}/{name}": own for (parameter, number), own in zip(numbers, values)
                }
        return found

    def run(self, states: dict[Tensor, dict[str, Tensor]], group: dict[str, Any]) -> None:
        """Update state and master weights in place. Every data rank, and every rank of the cuts, must call this."""
        masters = [part.master for part in self.parts]
        for master in masters:
            state = states[master]
            if "step" not in state:
                state["step"] = torch.tensor(0.0)
            state["step"] += 1
        step = int(states[masters[0]]["step"])
        gradients = [torch.zeros_like(master) if master.grad is None else master.grad for master in masters]
        weights = join([master.detach().flatten() for master in masters], masters[0])
        owned = self.exchange.to_owners(weights)
        owned_gradients = self.exchange.to_owners(join([gradient.flatten() for gradient in gradients], masters[0]))
        for batch in self.batches:
            self._step(batch, owned, owned_gradients, step, group)
        self.exchange.to_ranges(owned, weights)
        for master, values in zip(masters, weights.split([master.numel() for master in masters])):
            master.copy_(values.view_as(master))

    def _step(self, batch: Batch, owned: Tensor, gradients: Tensor, step: int, group: dict[str, Any]) -> None:
        """Replace the weights of a batch, flat among the owned numbers, by what the rule makes of them."""
        stack, rule = batch.members[0][0], self.rule
        weight_NRC, gradient_NRC = (self._whole(flat, batch) for flat in (owned, gradients))
        try:
            new_NRC = rule.update(weight_NRC, gradient_NRC, batch.state, step, group, rule.options)
        except ValueError as error:
            raise ValueError(f"{rule.name}: {stack.name} and those like it: {error}") from error
        if not isinstance(new_NRC, Tensor) or new_NRC.shape != weight_NRC.shape:
            found = list(new_NRC.shape) if isinstance(new_NRC, Tensor) else type(new_NRC).__name__
            raise ValueError(
                f"{rule.name}: its update returned {found} for {len(weight_NRC)} matrices of {stack.name} and those like it; "
                f"it must return new weights of shape {list(weight_NRC.shape)}"
            )
        if stack.cut is not None:
            cut_group = getattr(self.groups, stack.cut.axis)
            is_by_column = stack.cut.dim == 1
            rows_NRC = own_rows(new_NRC.mT if is_by_column else new_NRC, stack.cut, cut_group)
            new_NRC = rows_NRC.mT if is_by_column else rows_NRC
        places = [owned[place : place + each.numel] for each, place in batch.members]
        shaped = [place.view(stack.count, stack.rows, stack.columns) for place in places]
        torch._foreach_copy_(shaped, list(new_NRC.split(stack.count)))

    def _whole(self, flat: Tensor, batch: Batch) -> Tensor:
        """The matrices of a batch, [N, R, C], gathered from the ranks of their cut."""
        stack = batch.members[0][0]
        pieces = [flat[place : place + each.numel] for each, place in batch.members]
        held_NRC = join(pieces, flat).view(-1, stack.rows, stack.columns)
        if stack.cut is None:
            return held_NRC
        cut_group = getattr(self.groups, stack.cut.axis)
        if stack.cut.dim == 1:
            return gather_rows(held_NRC.mT, stack.cut, cut_group).mT
        return gather_rows(held_NRC, stack.cut, cut_group)


def make_steps(
    parts: Sequence[list[Part]],
    stacks: Sequence[MatrixStack],
    groups: ProcessGroupCollection,
    settings: MuonConfig | PackageMatrices,
    base_width: int | None,
) -> list[WholeStep]:
    """The steps of parts that are handed over together, by the rule of these settings."""
    rule = find_rule(settings, base_width)
    return [WholeStep(members, stacks, groups, rule) for members in parts]
