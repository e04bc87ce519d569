"""Muon (Jordan et al. 2024): momentum, orthogonalised a matrix at a time; AdamW for everything that is not a matrix.

    M <- mu M + G;   U = G + mu M;   O = orthogonalize(U);   W <- (1 - rate decay) W - rate s O

with s = update_rms sqrt(longer side), which gives steps the size of AdamW's, so that both kinds of groups share one rate and
decay (Liu et al. 2025, arXiv 2502.16982, section 2.2). Under muP s = update_rms sqrt(base width) sqrt(rows / columns): the
step's spectral norm then follows the shape (Yang et al. 2023, arXiv 2310.17813, section 2), so activations change alike at
every width, whichever of the two sides grows, and the rate needs no rule of its own. M, U and W are elementwise on whatever ranges of matrices ZeRO left
to this rank; for O they go to the matrix's owner and come back (exchange.py). So whole matrices are orthogonalised under
every ZeRO stage and layout, once per step, and the step is that of one rank.

DeepSpeed steps one parameter group after the other, so each is exchanged on its own. Kinds of Muon and optimizers of packages
that need weights and a state of their own whole step in whole.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amfm.model.matrices import MatrixStack
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.pretrain.config.optimizers import MuonConfig, PackageMatrices
from amfm.pretrain.engine.adamw import MATRICES, MUON, AdamW
from amfm.pretrain.engine.muon.exchange import MatrixExchange, alike_batches, join
from amfm.pretrain.engine.muon.newton_schulz import orthogonalize
from amfm.pretrain.engine.parts import Part

if TYPE_CHECKING:
    from amfm.pretrain.engine.muon.whole import WholeStep


class Muon(AdamW):
    """Steps groups labelled `muon` by Muon, those labelled `matrices` by the settings' rule, and the others as AdamW does.

    `base_width`: of muP, where the model has one. `attach` tells it which matrices its parameters are, once a wrapper has cut them; a step before does nothing to them.
    Every rank must call `step` as often as all others.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        settings: MuonConfig | PackageMatrices,
        *,
        base_width: int | None = None,
        **adamw: Any,
    ) -> None:
        super().__init__(groups, **adamw)
        self.settings, self.base_width = settings, base_width
        self.steps: list[MatrixStep | WholeStep] = []
        for group in self.param_groups:
            if group["label"] == MUON:
                assert isinstance(settings, MuonConfig), "groups of packages are labeled otherwise"
                group["momentum"] = settings.momentum
                del group["betas"], group["eps"]

    def attach(
        self, parts: Sequence[Part], stacks: Sequence[MatrixStack], groups: ProcessGroupCollection, precision: str
    ) -> None:
        """Learn which ranges of which matrices are in the tensors that are stepped. No communication."""
        # bf16 is enough for a direction, and half of the traffic; processors that multiply it are twice as fast with it.
        is_bf16 = precision == "bf16" or any(part.master.is_cuda for part in parts)
        dtype = torch.bfloat16 if is_bf16 else None
        by_label = [part for part in parts if self.param_groups[part.group]["label"] in (MUON, MATRICES)]
        together: dict[int, list[Part]] = {}
        for part in by_label:
            # ZeRO hands over one tensor a call; without it a group's parameters come in one call.
            together.setdefault(part.group if part.replicated else id(part.master), []).append(part)
        if isinstance(self.settings, PackageMatrices) or self.settings.keeps_state_at_owners:
            from amfm.pretrain.engine.muon.whole import make_steps

            self.steps += make_steps(list(together.values()), stacks, groups, self.settings, self.base_width, dtype)
            return
        self.steps += [
            MatrixStep(members, stacks, groups, self.settings, self.base_width, dtype) for members in together.values()
        ]

    def owned_states(self) -> dict[str, Tensor]:
        """What a rule keeps of the matrices that this rank owns, by names that are those of any layout; views."""
        return {name: state for step in self.steps for name, state in step.owned_states().items()}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step the parameter groups of this call; DeepSpeed may pass one at a time."""
        assert closure is None, "gradients come from the engine"
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["label"] not in (MUON, MATRICES)]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["label"] in (MUON, MATRICES):
                here = {id(parameter) for parameter in group["params"]}
                for step in self.steps:
                    if id(step.parts[0].master) in here:
                        step.run(self.state, group)


class MatrixStep:
    """One step of the tensors that are handed over together: their momentum, updates and matrices."""

    def __init__(
        self,
        parts: list[Part],
        stacks: Sequence[MatrixStack],
        groups: ProcessGroupCollection,
        settings: MuonConfig,
        base_width: int | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.parts, self.groups, self.settings, self.base_width = parts, groups, settings, base_width
        self.dtype = dtype or parts[0].master.dtype
        self.exchange = MatrixExchange(parts, stacks)
        self.batches = [(members[0][0], [place for _, place in members]) for members in alike_batches(self.exchange)]

    def owned_states(self) -> dict[str, Tensor]:
        """Nothing: the momentum is where ZeRO left the master weights."""
        return {}

    def run(self, states: dict[Tensor, dict[str, Tensor]], group: dict[str, Any]) -> None:
        """Update momentum and master weights in place. Every data rank, and every rank of the cuts, must call this."""
        rate, weight_decay = group["lr"], group["weight_decay"]
        updates = join(
            [self._update(part.master, states[part.master]).to(self.dtype) for part in self.parts], self.parts[0].master
        )
        owned = self.exchange.to_owners(updates)
        for stack, places in self.batches:
            self._orthogonalize(stack, [owned[place : place + stack.numel] for place in places])
        self.exchange.to_ranges(owned, updates)
        for part, values in zip(self.parts, updates.split([part.master.numel() for part in self.parts])):
            part.master.mul_(1.0 - rate * weight_decay).add_(values.view_as(part.master), alpha=-rate)

    def _update(self, master: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Add the gradient to the momentum; the flat update, a step of Nesterov's ahead of it."""
        if "momentum" not in state:
            state["momentum"], state["step"] = torch.zeros_like(master), torch.tensor(0.0)
        mu = self.settings.momentum
        state["step"] += 1
        gradient = torch.zeros_like(master) if master.grad is None else master.grad
        momentum = state["momentum"].mul_(mu).add_(gradient)
        return gradient.add(momentum, alpha=mu).flatten()

    def _orthogonalize(self, stack: MatrixStack, updates: list[Tensor]) -> None:
        """Replace flat updates of like stacks by their orthogonalised and scaled matrices."""
        matrices_NRC = join(updates, updates[0]).view(-1, stack.rows, stack.columns)
        cut = stack.cut
        found_NRC = orthogonalize(
            matrices_NRC,
            self.settings.rounds,
            shape=stack.shape,
            cut=cut,
            group=None if cut is None else getattr(self.groups, cut.axis),
        )
        rows, columns = stack.shape
        squared = max(rows, columns) if self.base_width is None else self.base_width * rows / columns
        found_NRC = found_NRC * (self.settings.update_rms * math.sqrt(squared))
        places = [update.view(stack.count, stack.rows, stack.columns) for update in updates]
        torch._foreach_copy_(places, list(found_NRC.split(stack.count)))
