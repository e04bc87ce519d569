"""The indexer of sparse attention: narrow heads score all keys, and each token attends only to the highest.

Sizes: B rows, T tokens, S all tokens so far, D model, X what queries are made of, I heads, C their size.

Its loss is not part of these files: a choice has no gradient, so training leaves its weights as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .documents_amfm import Stretch
from .rotary_amfm import rotate, rotation


class Indexer(nn.Module):
    """score(t, s) = sum_i weight_ti relu(q_ti . k_s) / sqrt(heads x channels) (DeepSeek-AI 2025, arXiv 2512.02556, section 2.1).

    In stage `warm_up` attention reads all keys, and these weights wait.
    """

    def __init__(self, options: dict[str, Any], width: int, query_width: int) -> None:
        super().__init__()
        self.options, self.is_sparse = options, options["stage"] == "sparse"
        self.heads, self.size = options["num_heads"], options["head_dim"]
        self.query = nn.Linear(query_width, self.heads * self.size, bias=False)
        self.key = nn.Linear(width, self.size, bias=False)
        self.head_weights = nn.Linear(width, self.heads, bias=False)
        self.key_norm = nn.LayerNorm(self.size, eps=1e-6)

    @torch.no_grad()
    def choose(
        self, x_BTD: Tensor, query_BTX: Tensor, stretch: Stretch, rope: dict[str, Any] | None, known_BSC: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Which keys each token reads, [B, T, S] bool, and the indexer's keys [B, S, C], those of a state before them.

        x_BTD: what its keys are made of; query_BTX: its queries; rope: of attention, None if nothing is rotated.
        """
        q_BTIC = self.query(query_BTX).unflatten(-1, (self.heads, self.size))
        k_BTC = self.key_norm(self.key(x_BTD))
        if rope is not None:
            cos, sin = rotation(rope | {"fraction": self.options["rope_fraction"]}, self.size, stretch.positions_BT)
            q_BTIC, k_BTC = rotate(q_BTIC, cos, sin), rotate(k_BTC[:, :, None], cos, sin)[:, :, 0]
        k_BSC = k_BTC if known_BSC is None else torch.cat([known_BSC, k_BTC], dim=1)
        weight_BTI = self.head_weights(x_BTD).float() * (self.heads * self.size) ** -0.5
        products_BTIS = torch.einsum("btic,bsc->btis", q_BTIC.float(), k_BSC.float())
        scores_BTS = torch.einsum("bti,btis->bts", weight_BTI, products_BTIS.relu())
        tokens, keys = scores_BTS.shape[1:]
        place_S = torch.arange(keys, device=x_BTD.device)
        place_T1 = place_S[keys - tokens :, None]
        seen_BTS = (place_S <= place_T1).expand_as(scores_BTS)
        if stretch.text_BS is not None:
            seen_BTS = seen_BTS & stretch.text_BS[:, None]
        # A stable order: of equal scores the earlier key is taken, as in training.
        order_BTS = scores_BTS.masked_fill(~seen_BTS, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        chosen_BTS = torch.zeros_like(seen_BTS).scatter(-1, order_BTS[..., : self.options["top_k"]], True) & seen_BTS
        if stretch.text_BT is not None:
            # A padded query sees itself, so that its softmax has something to sum.
            chosen_BTS = chosen_BTS | ((place_S == place_T1) & ~stretch.text_BT[:, :, None])
        return chosen_BTS, k_BSC
