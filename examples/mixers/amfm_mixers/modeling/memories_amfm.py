"""Mixture of memories; sizes as in mixers_amfm.py: K memories of a token, M memories."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from amfm.pretrain.export.modeling_template.linear_mixers_amfm import LinearMixer, State


class Memories(nn.Module):
    """A linear mixer with several states; a router chooses those that a token writes and reads (arXiv 2502.13685)."""

    def __init__(self, options: dict[str, Any], inner: LinearMixer, config: Any) -> None:
        super().__init__()
        self.options, self.inner = options, inner
        self.memories = options["num_memories"] + options["shared_memory"]
        self.router = nn.Parameter(torch.zeros(options["num_memories"], config.hidden_size))

    wraps_mixer = True  # whose name its options have; it is built first

    def forward(
        self, x_BTD: Tensor, mask_BT: Tensor | None, positions_BT: Tensor, state: State | None
    ) -> tuple[Tensor, State]:
        """x [B, T, D] -> y [B, T, D] and the states [B, M, ...] after it; token after token."""
        chosen = self._choose(F.linear(x_BTD, self.router))
        # Inside of the inner mixer's own forward pass, where its weights are available.
        recur = partial(self._recur, chosen, mask_BT, positions_BT, state)
        y_BTD, state = self.inner(x_BTD, mask_BT, positions_BT, None, recur)
        return y_BTD, state

    def _recur(
        self,
        chosen: tuple[Tensor, Tensor],
        mask_BT: Tensor | None,
        positions_BT: Tensor,
        state: State | None,
        parts: dict[str, Tensor],
    ) -> tuple[Tensor, State]:
        """Run the inner recurrence over the memories that each token chose: outputs [B, T, I] and states."""
        weights_BTK, memory_BTK = chosen
        rows, tokens, _ = weights_BTK.shape
        if state is None:
            like = parts[self.inner.convolved[0]]
            state = tuple(part.unflatten(0, (rows, -1)) for part in self.inner.empty_state(like, rows * self.memories))
        copies = memory_BTK.shape[2]
        positions_BT = positions_BT.expand(rows, -1)
        row_BK = torch.arange(rows, device=memory_BTK.device)[:, None].expand(-1, copies)
        outputs = []
        for token in range(tokens):
            memory_BK, now = memory_BTK[:, token], slice(token, token + 1)
            # The chosen memories of all rows form one batch for the inner mixer: a row a choice.
            own = tuple(part[row_BK, memory_BK].flatten(0, 1) for part in state)
            each = {name: part[:, now].repeat_interleave(copies, dim=0) for name, part in parts.items()}
            mask = None if mask_BT is None else mask_BT[:, now].repeat_interleave(copies, dim=0)
            o_RTHV, following = self.inner.mix(each, mask, positions_BT[:, now].repeat_interleave(copies, dim=0), own)
            y_BKI = self.inner.output(o_RTHV, each)[:, 0].unflatten(0, (rows, copies))
            outputs.append((y_BKI * weights_BTK[:, token, :, None].to(y_BKI.dtype)).sum(1))
            state = tuple(
                part.index_put((row_BK, memory_BK), new.unflatten(0, (rows, copies)).to(part.dtype))
                for part, new in zip(state, following)
            )
        return torch.stack(outputs, dim=1), state

    def _choose(self, logits_BTM: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the memories [B, T, choices] of each token and their weights, which sum to 1; the shared one last, at 1."""
        top_BTK, memory_BTK = logits_BTM.float().softmax(-1).topk(self.options["top_k"], dim=-1)
        weights_BTK = top_BTK / top_BTK.sum(-1, keepdim=True)
        if self.options["shared_memory"]:
            weights_BTK = F.pad(weights_BTK, (0, 1), value=1.0)
            memory_BTK = F.pad(memory_BTK, (0, 1), value=self.options["num_memories"])
        return weights_BTK, memory_BTK

    def give_first_values(self, deviation: float) -> None:
        """A normal router."""
        init.normal_(self.router, std=deviation)
