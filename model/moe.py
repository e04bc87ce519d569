"""The mixture-of-experts block's mixer: a router, routed experts, an optional shared expert, and what balances them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.moe.losses import balance_loss, router_z_loss, sequence_balance_loss
from kernels.moe.op import Routing, expert_feed_forward, route
from model.config import ModelConfig, MoeConfig
from model.feed_forward import FeedForward, up_segments
from model.groups import ProcessGroupCollection
from model.layers import Cut, KeepsBuffers, Linear, Shard, divide
from model.mixer import BlockState, MixerOutput
from model.packing import PackMeta
from model.regions import enter_tensor_region, gather_tokens, leave_tensor_region, sum_gradients


class MoeMixer(KeepsBuffers):
    """y = sum over the top-k experts of weight * expert(x), plus the shared expert; dropless.

    Logits, scores and weights are computed in float32 (or more) whatever the dtype of the weights, and the balancing bias
    stays in float32 under any cast. With `latent_size`, latent_down narrows what the routed experts see and latent_up
    widens their sum; router and shared expert read the full width. Each expert's inner width is cut over the
    tensor-parallel ranks; the router is whole on each of them, so all choose alike.

    Auxiliary losses come weighted, by name: `balance`, `sequence_balance`, `router_z`. Each is a mean over the tokens (or
    rows) of the micro-batch it was computed on. Adding up: a model sums them over its blocks; a step averages them over
    its micro-batches, those of all data ranks, and adds them to the mean loss a token.
    """

    def __init__(self, config: ModelConfig, groups: ProcessGroupCollection, backend: str) -> None:
        super().__init__()
        assert config.moe is not None, "check_model was not called: model.moe is missing"
        moe: MoeConfig = config.moe
        self.section, self.backend, self.groups = moe, backend, groups
        self.router = Linear(config.hidden_size, moe.num_experts, groups)
        self.expert_bias: Tensor | None
        self.register_buffer("expert_bias", torch.zeros(moe.num_experts) if moe.expert_bias else None)
        width = moe.latent_size or config.hidden_size
        self.latent_down = Linear(config.hidden_size, width, groups) if moe.latent_size else None
        self.latent_up = Linear(width, config.hidden_size, groups) if moe.latent_size else None
        self.experts = Experts(moe, width, groups)
        self.shared = None
        if moe.shared_expert_hidden_size:
            self.shared = FeedForward(
                config.hidden_size,
                moe.shared_expert_hidden_size,
                moe.activation,
                groups,
                name="model.moe.shared_expert_hidden_size",
                backend=backend,
            )

    def reset_buffers(self) -> None:
        """Sets the balancing bias to zero."""
        if self.expert_bias is not None:
            self.expert_bias.zero_()

    def forward(self, x_BTD: Tensor, meta: PackMeta, state: BlockState = None) -> MixerOutput:
        """x [B, T, D] -> y [B, T, D], the auxiliary losses, and how many token choices each expert got [E]."""
        logits_RE = gather_tokens(self._logits(x_BTD), self.groups).flatten(0, 1)
        moe = self.section
        routing = route(
            logits_RE,
            self.expert_bias,
            score=moe.router,
            top_k=moe.top_k,
            normalize=moe.normalize_probabilities,
            scaling=moe.routed_scaling,
            num_groups=moe.num_router_groups,
            group_top_k=moe.router_group_top_k,
            backend=self.backend,
        )
        y_BTD = self._routed(x_BTD, routing)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD)
        auxiliary = auxiliary_losses(logits_RE, routing, x_BTD.shape[0], moe) if self.training else {}
        return MixerOutput(y_BTD, None, auxiliary, routing.counts_E)

    def _logits(self, x_BTD: Tensor) -> Tensor:
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        return functional.linear(x_BTD.to(dtype), self.router.weight.to(dtype))

    def _routed(self, x_BTD: Tensor, routing: Routing) -> Tensor:
        if self.latent_down is not None:
            x_BTD = self.latent_down(x_BTD)
        # Each tensor rank computes a part of every expert's inner width for all tokens.
        x_BTD = enter_tensor_region(x_BTD, self.groups)
        y_RD = expert_feed_forward(
            x_BTD.flatten(0, 1),
            routing.expert_ids_RK,
            sum_gradients(routing.weights_RK, self.groups),
            self.experts.up,
            self.experts.down,
            activation=self.section.activation,
            backend=self.backend,
        )
        y_BTD = leave_tensor_region(y_RD.view_as(x_BTD), self.groups)
        return y_BTD if self.latent_up is None else self.latent_up(y_BTD)

    @torch.no_grad()
    def update_expert_bias(self, counts_E: Tensor) -> None:
        """Moves each expert's bias by the update rate towards the mean load (Wang et al. 2024, arXiv 2408.15664, algorithm 1).

        counts_E [E] are the choices of the whole step, already summed over micro-batches and data ranks.
        """
        if self.expert_bias is None:
            return
        counts_E = counts_E.to(self.expert_bias)
        self.expert_bias.add_(torch.sign(counts_E.mean() - counts_E), alpha=self.section.bias_update_rate)


class Experts(nn.Module):
    """The stacked weights of the routed experts: up [E, F, D] (SwiGLU: gate rows, then up rows), down [E, D, F]."""

    def __init__(self, moe: MoeConfig, width: int, groups: ProcessGroupCollection) -> None:
        super().__init__()
        segments = up_segments(moe.expert_hidden_size, moe.activation)
        inner = divide(moe.expert_hidden_size, groups, "model.moe.expert_hidden_size", axis="expert_tensor")
        self.up = nn.Parameter(torch.empty(moe.num_experts, inner * len(segments), width))
        self.down = nn.Parameter(torch.empty(moe.num_experts, width, inner))
        by_expert = Cut(0, "ep", (moe.num_experts,))
        self.shards = {
            "up": Shard((by_expert, Cut(1, "expt_tp", segments))),
            "down": Shard((by_expert, Cut(2, "expt_tp", (moe.expert_hidden_size,)))),
        }


def auxiliary_names(moe: MoeConfig) -> list[str]:
    """The losses that `auxiliary_losses` gives."""
    weights = {
        "balance": moe.auxiliary_loss_weight,
        "sequence_balance": moe.sequence_loss_weight,
        "router_z": moe.z_loss_weight,
    }
    return [name for name, weight in weights.items() if weight]


def auxiliary_losses(logits_RE: Tensor, routing: Routing, num_rows: int, moe: MoeConfig) -> dict[str, Tensor]:
    """The weighted losses that keep a router balanced and its logits small; those of weight 0 are left out."""
    losses: dict[str, Tensor] = {}
    if moe.auxiliary_loss_weight:
        losses["balance"] = moe.auxiliary_loss_weight * balance_loss(routing.scores_RE, routing.counts_E, moe.top_k)
    if moe.sequence_loss_weight:
        scores_BTE = routing.scores_RE.unflatten(0, (num_rows, -1))
        ids_BTK = routing.expert_ids_RK.unflatten(0, (num_rows, -1))
        losses["sequence_balance"] = moe.sequence_loss_weight * sequence_balance_loss(scores_BTE, ids_BTK)
    if moe.z_loss_weight:
        losses["router_z"] = moe.z_loss_weight * router_z_loss(logits_RE)
    return losses
