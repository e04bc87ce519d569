"""Low-rank updates of which a router chooses some for each token: what LoRA-Mixer puts next to projections of attention
and SSMs.

    y = W x + (alpha / r) sum over the top k of E of p_e B_e A_e x

A block has one router, which reads what its mixer reads, so that all projections of a token choose alike. The factors of the
E updates are one after the other, as one of rank E r (model/parallel/layers.py), between whose factors each token has the
weights p of the chosen, and zeros: E r is small next to the width, and products of whole matrices are quicker than the
sorting that would spare the zeros. So names, first values, cuts over tensor ranks and freezing are those of one update, and
no collective is added to those that the router of experts has. For the first `hard_from_step` steps of training all E count,
by the softmax, so that each gets gradients before choices are hard. After LoRA-Mixer, of whose Specialization Balance Loss
no more than the idea could be read, balance over all tokens and sharpness of each. Ours is the balance of the experts' router
(Fedus et al. 2021, arXiv 2101.03961, section 2.2), and

    w min(1, H(mean over tokens of p) / log E) mean over tokens of H(p)

with the entropy H, the first factor a constant to the gradient: sharpness waits until choices are balanced.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from amfm.kernels.linear.op import linear_float32
from amfm.kernels.moe.grouping import balance_loss
from amfm.kernels.moe.op import route
from amfm.model.build import build_mixer
from amfm.model.config.schema import BALANCE, SPECIALIZATION, LoraMixerConfig, ModelConfig
from amfm.model.mixers.interface import MixerOutput
from amfm.model.parallel.groups import ProcessGroupCollection, single_rank_groups
from amfm.model.parallel.layers import ColumnLinear, Linear, LowRankUpdate, RowLinear
from amfm.model.parallel.regions import gather_stream, sum_gradients

PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "in": "in_proj", "out": "out_proj"}
# Ends of the names of what this adds to a model.
ENDS = (".lora.down", ".lora.up", ".updates.router.weight")


class RoutedUpdates(nn.Module):
    """The router of a block's updates; the updates themselves are `lora` of the layers of its mixer.

    It hangs on the mixer's forward pass: before it the router chooses, after it the balance joins the auxiliary losses. So
    blocks and mixers know nothing of it. Every rank of `groups.tp` must call `choose`. Context ranks are rejected (pretrain/checks/sections.py).
    """

    def __init__(
        self, mixer: nn.Module, config: LoraMixerConfig, width: int, groups: ProcessGroupCollection, backend: str
    ) -> None:
        super().__init__()
        self.section, self.groups, self.backend = config, groups, backend
        self.router = Linear(width, config.num_experts, groups)
        updates = []
        for layer in projections_of(mixer, config.targets).values():
            (cut,) = layer.shards["weight"].cuts
            rank = config.num_experts * config.rank
            layer.lora = LowRankUpdate(layer.weight, cut, rank, config.alpha / config.rank)
            updates.append(layer.lora)
        # A tuple: they belong to their layers, and have their names from there.
        self.updates = tuple(updates)
        self.soft = False
        # Where someone measures: tokens by update [E], added up over calls.
        self.measured: Tensor | None = None
        self._balance: dict[str, Tensor] = {}
        mixer.register_forward_pre_hook(self._before_mixer)
        mixer.register_forward_hook(self._after_mixer)

    def _before_mixer(self, mixer: nn.Module, given: tuple[Any, ...]) -> None:
        self._balance = self.choose(given[0])

    def _after_mixer(self, mixer: nn.Module, given: tuple[Any, ...], mixed: MixerOutput) -> MixerOutput:
        balance, self._balance = self._balance, {}
        return mixed._replace(auxiliary=(mixed.auxiliary or {}) | balance)

    def set_step(self, step: int, total_steps: int, seed: int) -> None:
        """Let all updates count for the steps that ask for it."""
        self.soft = self.section.hard_from_step is not None and step < self.section.hard_from_step

    def choose(self, x_BTD: Tensor) -> dict[str, Tensor]:
        """Choose for the tokens x [B, T, D] (under sequence parallelism this rank's), until the next call.

        Returns the weighted loss that balances the router, only in training.
        """
        section = self.section
        logits_BTE = gather_stream(linear_float32(x_BTD, self.router.weight), self.groups)
        routing = route(
            logits_BTE.flatten(0, 1),
            None,
            score="softmax",
            top_k=section.top_k,
            # The weight of a single choice must not always be one, or the router would learn nothing.
            normalize=section.top_k > 1,
            scaling=1.0,
            backend=self.backend,
        )
        if self.measured is not None:
            self.measured += routing.counts_E
        if self.soft and self.training:
            weights_RE = routing.scores_RE
        else:
            weights_RE = torch.zeros_like(routing.scores_RE).scatter(1, routing.expert_ids_RK, routing.weights_RK)
        # Every tensor rank's rows or columns give a part of the gradient.
        gates_BTE = sum_gradients(weights_RE.view_as(logits_BTE), self.groups)
        gates = gates_BTE.repeat_interleave(section.rank, dim=-1).to(x_BTD.dtype)
        for update in self.updates:
            update.gates = gates
        losses: dict[str, Tensor] = {}
        if self.training and section.balance_weight:
            loss = balance_loss(routing.scores_RE, routing.counts_E, section.top_k)
            losses[BALANCE] = section.balance_weight * loss
        if self.training and section.specialization_weight:
            losses[SPECIALIZATION] = section.specialization_weight * sharpness_loss(routing.scores_RE)
        return losses


def sharpness_loss(scores_RE: Tensor) -> Tensor:
    """Mean entropy of tokens' scores [R, E], times the entropy of the mean over the largest there is."""

    def entropy(p: Tensor) -> Tensor:
        return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(-1)

    balanced = entropy(scores_RE.mean(0)).detach() / math.log(scores_RE.shape[1])
    return balanced.clamp(max=1.0) * entropy(scores_RE).mean()


def put_updates(
    mixer: nn.Module, config: ModelConfig, groups: ProcessGroupCollection, backend: str
) -> RoutedUpdates | None:
    """Put updates next to the projections of a mixer, where `model.lora_mixer` asks for them; returns their router."""
    routed = config.lora_mixer
    if routed is None or not projections_of(mixer, routed.targets):
        return None
    return RoutedUpdates(mixer, routed, config.hidden_size, groups, backend)


def projections_of(mixer: nn.Module, targets: tuple[str, ...]) -> dict[str, ColumnLinear | RowLinear]:
    """The projections `targets` (q, k, v, o, in, out) that a mixer has and applies updates of, by their names."""
    has_both = getattr(mixer, "has_in_out_updates", False)
    names = {PROJECTIONS[target] for target in targets if has_both or target not in ("in", "out")}
    return {
        name: layer
        for name, layer in mixer.named_children()
        if name in names and isinstance(layer, ColumnLinear | RowLinear)
    }


def update_shapes(config: ModelConfig, symbol: str) -> dict[str, tuple[int, ...]]:
    """List names and shapes of what routed updates add to a block of this kind, under the block's name; nothing is allocated."""
    routed = config.lora_mixer
    if routed is None:
        return {}
    groups = single_rank_groups()
    with torch.device("meta"):
        mixer = build_mixer(config.built_letters.index(symbol), config, groups, "torch")
        updates = put_updates(mixer, config, groups, "torch")
    if updates is None:
        return {}
    named = {f"mixer.{name}": tensor for name, tensor in mixer.named_parameters() if name.endswith(ENDS)}
    named |= {f"updates.{name}": tensor for name, tensor in updates.named_parameters()}
    return {name: tuple(tensor.shape) for name, tensor in named.items()}
