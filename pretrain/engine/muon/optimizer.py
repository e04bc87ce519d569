"""Muon (Jordan et al. 2024): momentum, orthogonalised a matrix at a time; AdamW for everything that is not a matrix.

    M <- mu M + G;   U = G + mu M;   O = orthogonalize(U);   W <- (1 - rate decay) W - rate s O

with s = update_rms sqrt(longer side), which gives steps the size of AdamW's, so that both kinds of groups share one rate and
decay (Liu et al. 2025, arXiv 2502.16982, section 2.2). Under muP s = update_rms sqrt(base width) sqrt(rows / columns): the
step's spectral norm then follows the shape (Yang et al. 2023, arXiv 2310.17813, section 2), so activations change alike at
every width, whichever of the two sides grows, and the rate needs no rule of its own. M, U and W are elementwise on whatever ranges of matrices ZeRO left
to this rank; for O they go to the matrix's owner and come back (exchange.py). So whole matrices are orthogonalised under
every ZeRO stage and layout, once per step, and the step is that of one rank.

DeepSpeed steps one parameter group after the other, so each is exchanged on its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from amfm.model.matrices import MatrixStack
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.pretrain.config.schema import MuonConfig
from amfm.pretrain.engine.moments import MUON, AdamW
from amfm.pretrain.engine.muon.exchange import MatrixExchange, join
from amfm.pretrain.engine.muon.newton_schulz import BATCH_ELEMENTS, orthogonalize
from amfm.pretrain.engine.parts import Part


class Muon(AdamW):
    """Steps groups labelled `muon` by Muon and the others as AdamW does.

    `base_width`: of muP, where the model has one. `attach` tells it which matrices its parameters are, once a wrapper has cut them; a step before does nothing to them.
    Every rank must call `step` as often as all others.
    """

    def __init__(
        self, groups: list[dict[str, Any]], settings: MuonConfig, *, base_width: int | None = None, **adamw: Any
    ) -> None:
        super().__init__(groups, **adamw)
        self.settings, self.base_width = settings, base_width
        self.steps: list[MatrixStep] = []
        for group in self.param_groups:
            if group["label"] == MUON:
                group["momentum"] = settings.momentum
                del group["betas"], group["eps"]

    def attach(self, parts: Sequence[Part], stacks: Sequence[MatrixStack], groups: ProcessGroupCollection) -> None:
        """Learn which ranges of which matrices lie in the tensors that are stepped. No communication."""
        by_label = [part for part in parts if self.param_groups[part.group]["label"] == MUON]
        together: dict[int, list[Part]] = {}
        for part in by_label:
            # ZeRO hands over one tensor a call; without it a group's parameters come in one call.
            together.setdefault(part.group if part.replicated else id(part.master), []).append(part)
        self.steps = [
            MatrixStep(members, stacks, groups, self.settings, self.base_width) for members in together.values()
        ]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step the parameter groups of this call; DeepSpeed may pass one at a time."""
        assert closure is None, "gradients come from the engine"
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["label"] != MUON]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["label"] == MUON:
                here = {id(parameter) for parameter in group["params"]}
                for step in self.steps:
                    if id(step.parts[0].master) in here:
                        step.run(self.state, group["lr"], group["weight_decay"])


class MatrixStep:
    """One step of the tensors that are handed over together: their momentum, updates and matrices."""

    def __init__(
        self,
        parts: list[Part],
        stacks: Sequence[MatrixStack],
        groups: ProcessGroupCollection,
        settings: MuonConfig,
        base_width: int | None,
    ) -> None:
        self.parts, self.groups, self.settings, self.base_width = parts, groups, settings, base_width
        self.exchange = MatrixExchange(parts, stacks)

    def run(self, states: dict[Tensor, dict[str, Tensor]], rate: float, weight_decay: float) -> None:
        """Update momentum and masters in place. Every data rank, and every rank of the cuts, must call this."""
        # bf16 is enough for a direction, and half of the traffic; processors multiply float32 as fast.
        master = self.parts[0].master
        dtype = torch.bfloat16 if master.device.type == "cuda" else master.dtype
        updates = join([self._update(part.master, states[part.master]).to(dtype) for part in self.parts], master)
        owned = self.exchange.to_owners(updates)
        for stack, places in self._batches():
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

    def _batches(self) -> Iterator[tuple[MatrixStack, list[int]]]:
        """Yield stacks that are alike but for their place, one to stand for all, with their places among the owned."""
        alike: dict[tuple[Any, ...], tuple[MatrixStack, list[int]]] = {}
        for stack, place in zip(self.exchange.stacks, self.exchange.places, strict=True):
            key = (stack.count, stack.rows, stack.columns, stack.cut)
            alike.setdefault(key, (stack, []))[1].append(place)
        for stack, places in alike.values():
            size = max(1, BATCH_ELEMENTS // stack.numel)
            for first in range(0, len(places), size):
                yield stack, places[first : first + size]

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
