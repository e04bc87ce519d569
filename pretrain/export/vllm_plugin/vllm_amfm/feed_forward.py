"""Dense feed-forwards and mixtures of experts on vLLM's projections and its fused experts.

Sizes: N tokens of all requests, D model, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)


class FeedForward(nn.Module):
    """down(activation(up(x))), with SwiGLU or squared ReLU."""

    def __init__(self, width: int, hidden: int, activation: str, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        quant = vllm_config.quant_config
        self.is_gated = activation == "swiglu"
        if self.is_gated:
            self.up_proj: nn.Module = MergedColumnParallelLinear(
                width, [hidden, hidden], bias=False, quant_config=quant, prefix=f"{prefix}.up_proj"
            )
        else:
            self.up_proj = ColumnParallelLinear(
                width, hidden, bias=False, quant_config=quant, prefix=f"{prefix}.up_proj"
            )
        self.down_proj = RowParallelLinear(hidden, width, bias=False, quant_config=quant, prefix=f"{prefix}.down_proj")
        self.multiply = SiluAndMul()

    def forward(self, x_ND: Tensor) -> Tensor:
        """x [N, D] -> y [N, D]."""
        inner = self.up_proj(x_ND)[0]
        return self.down_proj(self.multiply(inner) if self.is_gated else F.relu(inner).square())[0]


class MixtureOfExperts(nn.Module):
    """Routed experts, an optional expert for every token with an optional gate, optional narrow experts."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.section: dict[str, Any] = config.moe
        width, experts, latent = config.hidden_size, self.section["num_experts"], self.section["latent_size"]
        self.router = GateLinear(
            width, experts, out_dtype=torch.float32, force_fp32_compute=True, prefix=f"{prefix}.router"
        )
        self.expert_bias = None
        if self.section["expert_bias"]:
            self.expert_bias = nn.Parameter(torch.zeros(experts, dtype=torch.float32), requires_grad=False)
        self.latent_down = self.latent_up = None
        if latent is not None:
            self.latent_down = ReplicatedLinear(width, latent, bias=False, prefix=f"{prefix}.latent_down")
            self.latent_up = ReplicatedLinear(latent, width, bias=False, prefix=f"{prefix}.latent_up")
        is_gated = self.section["activation"] == "swiglu"
        self.experts = FusedMoEFactory(
            num_experts=experts,
            top_k=self.section["top_k"],
            hidden_size=latent or width,
            intermediate_size=self.section["expert_hidden_size"],
            custom_routing_function=self.route,
            activation="silu" if is_gated else "relu2_no_mul",
            ckpt_names=("gate_proj", "down_proj", "up_proj") if is_gated else ("up_proj", "down_proj", None),
            quant_config=vllm_config.quant_config,
            router_logits_dtype=torch.float32,
            prefix=f"{prefix}.experts",
        )
        self.shared = self.shared_gate = None
        if self.section["shared_expert_hidden_size"]:
            hidden, activation = self.section["shared_expert_hidden_size"], self.section["activation"]
            self.shared = FeedForward(width, hidden, activation, vllm_config, f"{prefix}.shared")
            if self.section["shared_expert_gate"]:
                self.shared_gate = ReplicatedLinear(width, 1, bias=False, prefix=f"{prefix}.shared_gate")

    def forward(self, x_ND: Tensor) -> Tensor:
        """x [N, D] -> y [N, D]."""
        logits_NE = self.router(x_ND)[0]
        shared_ND = self.shared(x_ND) if self.shared is not None else None
        if shared_ND is not None and self.shared_gate is not None:
            shared_ND = shared_ND * torch.sigmoid(self.shared_gate(x_ND)[0])
        # The experts may write into what they read.
        inputs = x_ND.clone() if self.latent_down is None else self.latent_down(x_ND)[0]
        y_ND = self.experts(hidden_states=inputs, router_logits=logits_NE)
        if self.latent_up is not None:
            y_ND = self.latent_up(y_ND)[0]
        return y_ND if shared_ND is None else y_ND + shared_ND

    def route(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """Choose experts as the modelling files do: weights [N, choices] and ids. The names are those of vLLM's call."""
        logits_NE, section = gating_output.float(), self.section
        if section["router"] == "softmax":
            scores_NE = logits_NE.softmax(dim=-1)
        elif section["router"] == "sigmoid":
            scores_NE = logits_NE.sigmoid()
        else:
            scores_NE = F.softplus(logits_NE.clamp(min=-80.0)).sqrt()
        choice_NE = scores_NE if self.expert_bias is None else scores_NE + self.expert_bias
        groups, kept = section["num_router_groups"], section["router_group_top_k"]
        if kept < groups:
            grouped = choice_NE.view(choice_NE.shape[0], groups, -1)
            merit = section.get("group_score_top_k", section.get("router_group_merit", 2))
            best = grouped.topk(merit, dim=-1).values.sum(dim=-1).topk(kept, dim=-1).indices
            is_kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, True)
            choice_NE = grouped.masked_fill(~is_kept[..., None], -math.inf).view_as(choice_NE)
        ids = choice_NE.topk(topk, dim=-1).indices
        weights = scores_NE.gather(1, ids)
        if section["normalize_probabilities"]:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights * section["routed_scaling"], ids
