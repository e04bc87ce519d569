"""Kinds of residual stream next to the sum: what a block reads of the stream, and how its output joins.

Sizes: B rows, T tokens, D model, n tensors that the stream is after T. All is computed in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init


class AttentionResiduals(nn.Module):
    """What a block reads of the embedding and of sums of earlier blocks' outputs (Kimi Team 2026, arXiv 2603.15031).

    The stream is [B, T, n, D]: the embedding, sums of the outputs of `blocks_per_source` blocks each, the last as far as it
    has come.
    """

    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        self.begins = index % config.attention_residuals["blocks_per_source"] == 0
        self.epsilon = config.norm_epsilon
        self.query = nn.Parameter(torch.zeros(config.hidden_size))
        self.weight = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x [B, T, n, D], or the embedding [B, T, D] -> the mixture that is read, [B, T, D]: n times the mean by its weights."""
        wide_BTND = (x if x.dim() == 4 else x.unsqueeze(2)).float()
        keys_BTND = wide_BTND * torch.rsqrt(wide_BTND.pow(2).mean(-1, keepdim=True) + self.epsilon)
        share_BTN = (keys_BTND @ (self.query.float() * self.weight.float())).softmax(dim=-1)
        return (wide_BTND.shape[2] * (share_BTN.unsqueeze(-2) @ wide_BTND).squeeze(-2)).to(x.dtype), None

    def add(self, x: Tensor, y_BTD: Tensor, weights: None) -> Tensor:
        """The stream after the block, whose output y [B, T, D] begins a sum or joins the last one."""
        x_BTND, y_BT1D = x if x.dim() == 4 else x.unsqueeze(2), y_BTD.unsqueeze(2)
        if self.begins:
            return torch.cat([x_BTND, y_BT1D], dim=2)
        return torch.cat([x_BTND[:, :, :-1], x_BTND[:, :, -1:] + y_BT1D], dim=2)

    def total(self, x_BTND: Tensor) -> Tensor:
        """The stream as one tensor [B, T, D], for `hidden_states`."""
        return x_BTND.sum(dim=2)

    def give_first_values(self, deviation: float) -> None:
        """Queries of zero: a new model reads the sum."""
        init.zeros_(self.query)
        init.ones_(self.weight)


class HyperConnections(nn.Module):
    """n streams that a block reads, mixes and writes by weights per token (Xie et al. 2025, arXiv 2512.24880, section 4.2)."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        self.streams = config.hyper_connections["streams"]
        self.maps = StreamMaps(config, index) if index < len(config.letters()) else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [B, T, n, D], or the embedding [B, T, D] -> what is read [B, T, D], and the block's weights; the final norm reads the mean."""
        if self.maps is None:
            return self.total(x), None
        x_BTND = self._as_streams(x)
        weights_BTX = self.maps(x_BTND)
        return (weights_BTX[..., None, : self.streams] @ x_BTND.float()).squeeze(-2).to(x.dtype), weights_BTX

    def add(self, x: Tensor, y_BTD: Tensor, weights_BTX: Tensor | None) -> Tensor:
        """The streams after the block, mixed, with its output y [B, T, D] in each."""
        assert weights_BTX is not None, "of a block"
        number = self.streams
        mix_BTNN = weights_BTX[..., 2 * number :].unflatten(-1, (number, number))
        write_BTN1 = weights_BTX[..., number : 2 * number, None]
        return (mix_BTNN @ self._as_streams(x).float() + write_BTN1 * y_BTD.float().unsqueeze(-2)).to(x.dtype)

    def total(self, x_BTND: Tensor) -> Tensor:
        """The mean of all streams, [B, T, D]."""
        return x_BTND.mean(dim=2)

    def _as_streams(self, x: Tensor) -> Tensor:
        return x if x.dim() == 4 else x.unsqueeze(2).expand(-1, -1, self.streams, -1)


class StreamMaps(nn.Module):
    """The weights of a block: n that read, n that write and n x n that mix, which Sinkhorn's rounds make doubly stochastic."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        section, self.epsilon = config.hyper_connections, config.norm_epsilon
        number, self.rounds, self.turn = section["streams"], section["sinkhorn_iterations"], index % section["streams"]
        self.sizes = [number, number, number * number]
        self.weight = nn.Parameter(torch.zeros(sum(self.sizes), number * config.hidden_size))
        self.scale = nn.Parameter(torch.zeros(3))
        self.bias = nn.Parameter(torch.zeros(sum(self.sizes)))

    def forward(self, x_BTND: Tensor) -> Tensor:
        """x [B, T, n, D] -> weights [B, T, n + n + n n] in float32."""
        flat_BTX = x_BTND.float().flatten(-2)
        flat_BTX = flat_BTX * torch.rsqrt(flat_BTX.pow(2).mean(-1, keepdim=True) + self.epsilon)
        parts = (flat_BTX @ self.weight.float().T).split(self.sizes, dim=-1)
        biases = self.bias.float().split(self.sizes)
        read_BTN, write_BTN, mix_BTX = (
            self.scale[place].float() * part + biases[place] for place, part in enumerate(parts)
        )
        mix_BTNN = mix_BTX.unflatten(-1, (self.sizes[0], -1))
        for _ in range(self.rounds):
            mix_BTNN = mix_BTNN.log_softmax(dim=-2).log_softmax(dim=-1)
        return torch.cat([read_BTN.sigmoid(), 2 * write_BTN.sigmoid(), mix_BTNN.exp().flatten(-2)], dim=-1)

    def give_first_values(self, deviation: float) -> None:
        """A new model's streams are equal: half of what a block reads is of all, half of the one whose turn it is."""
        number = self.sizes[0]
        read_N = torch.full((number,), 0.5 / number)
        read_N[self.turn] += 0.5
        first = torch.cat([read_N.logit(), torch.zeros(number), 4 * torch.eye(number).flatten()])
        init.zeros_(self.weight)
        init.constant_(self.scale, 0.01)
        init.copy_(self.bias, first)


def make_stream(config: Any, index: int) -> AttentionResiduals | HyperConnections | None:
    """What block `index` reads the residual stream with, or after all of them the final norm; None: the stream is a sum."""
    if config.hyper_connections:
        return HyperConnections(config, index)
    return AttentionResiduals(config, index) if config.attention_residuals else None
