"""N-gram memory in plain torch; sizes as in mixers_amfm.py: R rows of tables that a token reads."""

from __future__ import annotations

import hashlib
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from amfm.pretrain.export.modeling_template.blocks_amfm import RMSNorm
from amfm.pretrain.export.modeling_template.documents_amfm import Stretch


class NgramMemory(nn.Module):
    """Tables that hashes of the last tokens look up (Cheng et al. 2026, arXiv 2601.07372, section 2).

    The state is the last tokens, each by one more than its id (0: none), and the last inputs of the convolution.
    """

    reads_tokens: ClassVar[bool] = True

    def __init__(self, options: dict[str, Any], config: Any, depth: float) -> None:
        super().__init__()
        self.most, heads, width = options["max_n"], options["num_heads"], config.hidden_size
        self.step, self.reach = options["max_n"], (options["conv_kernel"] - 1) * options["max_n"]
        self.sizes = primes(options["table_size"], (self.most - 1) * heads)
        read = len(self.sizes) * options["head_dim"]
        self.tables = nn.Parameter(torch.zeros(sum(self.sizes), options["head_dim"]))
        self.key_proj, self.value_proj = (nn.Linear(read, width, bias=False) for _ in range(2))
        self.key_norm, self.value_norm = (RMSNorm(width, config.norm_epsilon) for _ in range(2))
        self.conv_weight = nn.Parameter(torch.zeros(width, options["conv_kernel"]))

    def forward(
        self, x_BTD: Tensor, stretch: Stretch, state: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x [B, T, D] -> y [B, T, D] and the state after it. Raises ValueError for embeddings without token ids."""
        if stretch.tokens_BT is None:
            raise ValueError("{ngram_memory} looks tokens up; give input_ids, not inputs_embeds")
        rows, tokens, width = x_BTD.shape
        ids_BT, text_BT = stretch.tokens_BT + 1, stretch.text_BT
        if text_BT is not None:
            ids_BT = ids_BT * text_BT
        if state is None:
            state = ids_BT.new_zeros(rows, self.most - 1), x_BTD.new_zeros(rows, self.reach, width)
        ids_BS = torch.cat([state[0], ids_BT], dim=1)
        found_BTE = F.embedding(self._rows(ids_BS, tokens), self.tables).flatten(2)
        score_BT1 = (x_BTD.float() * self.key_norm(self.key_proj(found_BTE)).float()).sum(-1, keepdim=True)
        score_BT1 = score_BT1 / math.sqrt(width)
        gate_BT1 = torch.sigmoid(score_BT1.abs().clamp(min=1e-6).sqrt() * score_BT1.sign()).to(x_BTD.dtype)
        value_BTD = self.value_proj(found_BTE) * gate_BT1
        normed_BTD = self.value_norm(value_BTD)
        if text_BT is not None:
            normed_BTD = normed_BTD * text_BT[..., None]
        seen_BSD = torch.cat([state[1], normed_BTD], dim=1)
        mixed_BDT = F.conv1d(seen_BSD.transpose(1, 2), self.conv_weight[:, None], dilation=self.step, groups=width)
        return value_BTD + F.silu(mixed_BDT).transpose(1, 2), (ids_BS[:, tokens:], seen_BSD[:, tokens:])

    def _rows(self, ids_BS: Tensor, tokens: int) -> Tensor:
        """Rows of the tables that each of the last tokens reads, [B, T, R]."""
        heads, rows, start = len(self.sizes) // (self.most - 1), [], 0
        mixed_BT = torch.zeros_like(ids_BS[:, :tokens])
        for place in range(self.most):
            first = self.most - 1 - place
            mixed_BT = mixed_BT ^ (ids_BS[:, first : first + tokens] * multiplier(place))
            for size in self.sizes[(place - 1) * heads : place * heads] if place else ():
                rows.append(mixed_BT % size + start)
                start += size
        return torch.stack(rows, dim=-1)

    def give_first_values(self, deviation: float) -> None:
        """Normal rows of tables; the convolution begins at zero."""
        init.normal_(self.tables, std=deviation)
        init.zeros_(self.conv_weight)


def primes(least: int, count: int) -> list[int]:
    """The first primes from `least` on."""
    found: list[int] = []
    while len(found) < count:
        if all(least % part for part in range(2, math.isqrt(least) + 1)):
            found.append(least)
        least += 1
    return found


def multiplier(place: int) -> int:
    """An odd number for the token this many before another."""
    digest = hashlib.sha256(f"ngram_memory/{place}".encode()).digest()
    return int.from_bytes(digest[:5], "little") | 1
