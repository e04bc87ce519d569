"""RWKV-7's time mixing in plain torch, token after token; sizes as in linear_mixers_amfm.py."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from amfm.pretrain.export.modeling_template.delta_mixers_amfm import unit_length
from amfm.pretrain.export.modeling_template.linear_mixers_amfm import State, read, scan

INSIDES = ("decay", "rate", "gate")


class Rwkv7(nn.Module):
    """S <- diag(w) S - (a * c) (S^T c)^T + k v^T of shifted tokens (Peng et al. 2025, arXiv 2503.14456, section 4).

    The state is S and the token before.
    """

    decay_proj: Tensor
    rate_proj: Tensor
    gate_proj: Tensor
    decay_bias: Tensor
    rate_bias: Tensor
    removal_scale: Tensor
    write_mix: Tensor
    bonus: Tensor
    norm_weight: Tensor
    norm_bias: Tensor

    def __init__(self, options: dict[str, Any], config: Any, depth: float) -> None:
        super().__init__()
        self.heads, self.size, width = options["num_heads"], options["head_dim"], config.hidden_size
        inner, self.rank = self.heads * self.size, options["gate_rank"] or self.size
        self.in_proj = nn.Linear(width, 3 * inner, bias=False)
        self.shared_proj = nn.Parameter(torch.zeros(3 * self.rank, width))
        self.shift_bias = nn.Parameter(torch.zeros(6, width))
        for name in INSIDES:
            setattr(self, f"{name}_proj", nn.Parameter(torch.zeros(inner, self.rank)))
        for name in ("decay_bias", "rate_bias", "removal_scale", "write_mix", "bonus", "norm_weight", "norm_bias"):
            setattr(self, name, nn.Parameter(torch.zeros(inner)))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(
        self, x_BTD: Tensor, mask_BT: Tensor | None, positions_BT: Tensor, state: State | None
    ) -> tuple[Tensor, State]:
        """x [B, T, D] -> y [B, T, D] and the state after it."""
        if mask_BT is not None:
            x_BTD = x_BTD * mask_BT[..., None].to(x_BTD.dtype)
        if state is None:
            memory = x_BTD.new_zeros(len(x_BTD), self.heads, self.size, self.size, dtype=torch.float32)
            state = memory, x_BTD.new_zeros(len(x_BTD), 1, x_BTD.shape[2])
        moved_BTD = torch.cat([state[1], x_BTD[:, :-1]], dim=1) - x_BTD
        weights = [*self.in_proj.weight.chunk(3), *self.shared_proj.chunk(3)]
        mixed = (x_BTD + moved_BTD * shift_D for shift_D in self.shift_bias)
        r, k, v, decay, rate, gate = (F.linear(own, weight) for own, weight in zip(mixed, weights))
        decay = F.linear(decay.tanh(), self.decay_proj).float() + self.decay_bias.float()
        a = (F.linear(rate, self.rate_proj).float() + self.rate_bias.float()).sigmoid()
        removed = unit_length(self.by_head(k * self.removal_scale))
        k = (k.float() * (1.0 + (a - 1.0) * self.write_mix.float())).to(k.dtype)
        g = self.by_head(-math.exp(-0.5) * decay.sigmoid())
        rows = (self.by_head(r), self.by_head(k), self.by_head(v), g, self.by_head(a), removed)
        o_BTHV, memory = scan(self.step, rows, mask_BT, state[0])
        normed = F.layer_norm(o_BTHV.float(), (self.size,), eps=1e-5 * self.size).flatten(2)
        normed = normed * self.norm_weight.float() + self.norm_bias.float()
        own = self.by_head(r.float() * k.float() * self.bonus.float()).sum(-1, keepdim=True)
        total = normed + (own * self.by_head(v).float()).flatten(2)
        y_BTI = (total * F.linear(gate.sigmoid(), self.gate_proj).float()).to(x_BTD.dtype)
        return self.out_proj(y_BTI), (memory, x_BTD[:, -1:])

    def by_head(self, part: Tensor) -> Tensor:
        """[..., H * size] -> [..., H, size]."""
        return part.unflatten(-1, (self.heads, -1))

    def step(self, *token: Tensor) -> tuple[Tensor, Tensor]:
        """Remove along a * c what the state before held under c, decay it, write, read."""
        q, k, v, g, a, c, state = token
        held = read(state, c)
        state = g.exp()[..., None] * state - (a * c)[..., None] * held[..., None, :]
        state = state + k[..., None] * v[..., None, :]
        return read(state, q), state

    def give_first_values(self, deviation: float) -> None:
        """Normal low-rank projections; the rest as a new model of amfm begins."""
        init.normal_(self.shared_proj, std=deviation)
        for name in INSIDES:
            init.normal_(getattr(self, f"{name}_proj"), std=deviation)
        init.constant_(self.removal_scale, 0.85)
        for weight in (self.write_mix, self.norm_weight):
            init.ones_(weight)
