"""Forgetting attention in plain torch, with scores of all pairs of tokens; sizes as in mixers_amfm.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from amfm.pretrain.export.modeling_template.attention_amfm import gate_heads, gate_size, norm_heads
from amfm.pretrain.export.modeling_template.blocks_amfm import RMSNorm
from amfm.pretrain.export.modeling_template.linear_mixers_amfm import State


class Fox(nn.Module):
    """Softmax attention whose scores fade by sums of log forget gates (Lin et al. 2025, arXiv 2503.02130).

    The state is keys, values, the sums and which of the tokens so far are text.
    """

    def __init__(self, options: dict[str, Any], config: Any, depth: float) -> None:
        super().__init__()
        self.size, self.heads, self.gate = options["head_dim"], options["num_heads"], options["gate"]
        self.kv_heads, width = options["num_kv_heads"] or self.heads, config.hidden_size
        self.in_proj = nn.Linear(width, (self.heads + 2 * self.kv_heads) * self.size, bias=False)
        self.f_proj = nn.Linear(width, self.heads)
        self.out_proj = nn.Linear(self.heads * self.size, width, bias=False)
        if self.gate != "none":
            self.g_proj = nn.Linear(width, self.heads * gate_size(self.gate, self.size), bias=False)
        self.has_norms = options["qk_norm"]
        if self.has_norms:
            self.q_norm = RMSNorm(self.size, config.norm_epsilon)
            self.k_norm = RMSNorm(self.size, config.norm_epsilon)

    def forward(
        self, x_BTD: Tensor, mask_BT: Tensor | None, positions_BT: Tensor, state: State | None
    ) -> tuple[Tensor, State]:
        """x [B, T, D] -> y [B, T, D] and the state after it."""
        rows, tokens, _ = x_BTD.shape
        widths = [self.heads * self.size, self.kv_heads * self.size, self.kv_heads * self.size]
        q, k, v = (part.unflatten(-1, (-1, self.size)) for part in self.in_proj(x_BTD).split(widths, dim=-1))
        if self.has_norms:
            q, k = norm_heads(self.q_norm, q), norm_heads(self.k_norm, k)
        is_text_BS = x_BTD.new_ones(rows, tokens, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
        sums_BSH = F.logsigmoid(self.f_proj(x_BTD).float()).cumsum(1)
        if state is not None:
            sums_BSH = sums_BSH + state[2][:, -1:]
            new = (k, v, sums_BSH, is_text_BS)
            k, v, sums_BSH, is_text_BS = (torch.cat(pair, dim=1) for pair in zip(state, new))
        sums_BHS = sums_BSH.transpose(1, 2)
        fading_BHTS = sums_BHS[:, :, -tokens:, None] - sums_BHS[:, :, None]
        places = torch.arange(k.shape[1], device=k.device)
        behind_TS = places[-tokens:, None] - places
        # A padded query sees itself, so that its softmax has something to sum.
        allowed = ((behind_TS >= 0) & is_text_BS[:, None, None]) | (behind_TS == 0)
        o_BTHK = self._attend(q, k, v, fading_BHTS.masked_fill(~allowed, -torch.inf))
        if self.gate != "none":
            o_BTHK = gate_heads(o_BTHK, self.g_proj(x_BTD))
        return self.out_proj(o_BTHK.flatten(2)), (k, v, sums_BSH, is_text_BS)

    def _attend(self, q_BTHK: Tensor, k_BSJK: Tensor, v_BSJK: Tensor, added_BHTS: Tensor) -> Tensor:
        """Softmax in float32; key heads are repeated for the query heads that share them."""
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=2) for x in (k_BSJK, v_BSJK))
        scores = torch.einsum("bthk,bshk->bhts", q_BTHK, k).float() * self.size**-0.5
        return torch.einsum("bhts,bshk->bthk", (scores + added_BHTS).softmax(-1).to(v.dtype), v)

    def give_first_values(self, deviation: float) -> None:
        """Forget gates of one half."""
        init.zeros_(self.f_proj.bias)
