"""Hyper-connections: n residual streams, which each block reads, mixes and writes by weights that it computes per token.

Xie et al. 2025 (mHC), arXiv 2512.24880: section 4.2 has the weights (equations 7 and 8) and the Sinkhorn rounds (equation 9),
section 4.3.1 the norm after the product. With the streams X [n, D] of a token before a block:

    h = scale * (W vec(X)) / rms(vec(X)) + bias           n + n + n x n numbers, a scale for each of the three parts
    read = sigmoid(h_1),  write = 2 sigmoid(h_2),  mix = sinkhorn(h_3): rounds of columns, then rows, to a sum of 1
    the block reads sum_i read_i X_i, and its output y joins:  X_i <- sum_j mix_ij X_j + write_i y

Before the first block all streams are the embedding; the final norm reads their mean, of which the papers' sum is n times as
much (Zhu et al. 2024, arXiv 2409.19606, section 2.1). First values: W is 0 as there (section 2.3) and scales are 0.01 (Table 5
of mHC); write is 1, and `read` sums to 1, half of it on all streams and half on the stream whose turn it is. A
new model is the plain one then, and yet streams become different: blocks take turns in whose output reaches which stream.

What flows between blocks: the streams as residual [B, T, n, D], and no delta (it has no width). In a block the
weights [B, T, n + n + n n] are the delta. Tokens do not meet, so context ranks and sequence parallelism need nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from amfm.model.config.schema import ModelConfig
from amfm.model.config.streams import HyperConnectionsConfig
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.layers import stream_shard
from amfm.model.parallel.shards import own_shapes
from amfm.model.streams.interface import StreamReader

FIRST_SCALE = 0.01
STAYS = 4.0  # first logit of the mixture's diagonal: of four streams each keeps 95% of itself per block


class HyperConnections(StreamReader):
    """The weights of block `index`, and what it does with the streams; before the final norm, their mean."""

    def __init__(
        self, options: HyperConnectionsConfig, index: int, config: ModelConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__()
        self.streams = options.streams
        is_final = index == len(config.letters)
        self.maps = None if is_final else StreamMaps(options, index, config, groups)

    def add(self, residual: Tensor, delta_BTD: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The streams [B, T, n, D], of the embedding [B, T, D] before the first block, and this block's weights as delta."""
        streams_BTND = residual
        if residual.dim() == 3:
            streams_BTND = residual.unsqueeze(2).expand(-1, -1, self.streams, -1)
        assert self.maps is not None, "the final norm adds nothing"
        return streams_BTND, self.maps(streams_BTND)

    def forward(self, residual: Tensor, delta_BTD: Tensor | None) -> Tensor:
        """What a block reads of the streams [B, T, n, D] by its weights, or the final norm: [B, T, D] in their dtype."""
        if self.maps is None:
            return residual.mean(dim=2)
        assert delta_BTD is not None, "`add` gives the weights"
        return _compute(read_streams, residual, delta_BTD)

    def leave(self, y_BTD: Tensor, residual: Tensor, delta_BTD: Tensor | None) -> tuple[Tensor, Tensor]:
        """The streams mixed, with the block's output written into each, and a delta without width."""
        assert delta_BTD is not None, "`add` gives the weights"
        return _compute(write_streams, residual, delta_BTD, y_BTD), y_BTD[..., :0]

    def send(self, residual: Tensor, delta_BTD: Tensor) -> Tensor:
        """The streams are all there is."""
        return residual.contiguous()

    def receive(self, sent_BTND: Tensor) -> tuple[Tensor, Tensor]:
        """The streams, and a delta without width."""
        return sent_BTND, sent_BTND[:, :, 0, :0]


class StreamMaps(nn.Module):
    """The weights with which a block reads, writes and mixes n streams, [B, T, n + n + n n] in this order, in float32 or float64.

    Parameters: weight [n (n + 2), n D] without a bias, first 0; scale [3] of read, write and mix, first 0.01; bias [n (n + 2)].
    """

    extra_repr = own_shapes

    def __init__(
        self, options: HyperConnectionsConfig, index: int, config: ModelConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__()
        self.turn, self.rounds = index % options.streams, options.sinkhorn_iterations
        self.streams, self.epsilon = options.streams, config.norm_epsilon
        number = options.num_weights
        self.weight = nn.Parameter(torch.empty(number, options.streams * config.hidden_size))
        self.scale = nn.Parameter(torch.empty(3))
        self.bias = nn.Parameter(torch.empty(number))
        self.shards = {name: stream_shard(groups) for name in ("weight", "scale", "bias")}

    def forward(self, streams_BTND: Tensor) -> Tensor:
        """Of streams [B, T, n, D] the weights [B, T, n + n + n n] of this block."""
        return _compute(self._weights, streams_BTND, self.weight, self.scale, self.bias)

    def _weights(self, streams_BTND: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        wide = torch.promote_types(streams_BTND.dtype, torch.float32)
        flat_BTX = streams_BTND.to(wide).flatten(-2)
        # Sums of squares without the squares in memory.
        squares_BT1 = torch.linalg.vector_norm(flat_BTX, dim=-1, keepdim=True).square()
        inverse_BT1 = (squares_BT1 / flat_BTX.shape[-1] + self.epsilon).rsqrt()
        sizes = [self.streams, self.streams, self.streams**2]
        parts = (flat_BTX @ weight.to(wide).T * inverse_BT1).split(sizes, dim=-1)
        read_BTN, write_BTN, mix_BTX = (
            own * part + shift
            for own, part, shift in zip(scale.to(wide), parts, bias.to(wide).split(sizes), strict=True)
        )
        mix_BTNN = sinkhorn(mix_BTX.unflatten(-1, (self.streams, self.streams)), self.rounds)
        return torch.cat([read_BTN.sigmoid(), 2 * write_BTN.sigmoid(), mix_BTNN.flatten(-2)], dim=-1)

    def first_value(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """First values: a constant one of each."""
        if name == "weight":
            return torch.zeros(shape)
        if name == "scale":
            return torch.full(shape, FIRST_SCALE)
        number = self.streams
        read_N = torch.full((number,), 0.5 / number, dtype=torch.float64)
        read_N[self.turn] += 0.5
        mix_NN = STAYS * torch.eye(number, dtype=torch.float64)
        return torch.cat([read_N.logit(), torch.zeros(number, dtype=torch.float64), mix_NN.flatten()])


def sinkhorn(logits_NN: Tensor, rounds: int) -> Tensor:
    """Make exp(logits [..., n, n]) doubly stochastic, nearly, by rounds of columns, then rows, divided by their sums.

    Sinkhorn and Knopp 1967, as equation 9 of mHC has it; on logarithms, of which none is too large or too small.
    """
    for _ in range(rounds):
        logits_NN = logits_NN.log_softmax(dim=-2)
        logits_NN = logits_NN.log_softmax(dim=-1)
    return logits_NN.exp()


def read_streams(streams_BTND: Tensor, weights_BTX: Tensor) -> Tensor:
    """sum_i read_i X_i [B, T, D] of weights [B, T, n + n + n n], in their dtype and then that of the streams."""
    read_BT1N = weights_BTX[..., : streams_BTND.shape[2]].unsqueeze(-2)
    return (read_BT1N @ streams_BTND.to(weights_BTX.dtype)).squeeze(-2).to(streams_BTND.dtype)


def write_streams(streams_BTND: Tensor, weights_BTX: Tensor, y_BTD: Tensor) -> Tensor:
    """sum_j mix_ij X_j + write_i y, [B, T, n, D], in the dtype of the weights and then that of the streams."""
    number = streams_BTND.shape[2]
    write_BTN1 = weights_BTX[..., number : 2 * number].unsqueeze(-1)
    mix_BTNN = weights_BTX[..., 2 * number :].unflatten(-1, (number, number))
    wide_BTND, wide_BT1D = streams_BTND.to(weights_BTX.dtype), y_BTD.unsqueeze(-2).to(weights_BTX.dtype)
    return torch.addcmul(mix_BTNN @ wide_BTND, write_BTN1, wide_BT1D).to(streams_BTND.dtype)


def _compute(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Compute a function of tensors, of which backward passes keep only the tensors, as they are."""
    found: Tensor = _Recomputing.apply(function, *tensors)
    return found


class _Recomputing(torch.autograd.Function):
    """Compute, and compute again for the gradients: a pass over the streams, which would keep n D float32 numbers per token."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Compute."""
        ctx.save_for_backward(*tensors)
        ctx.function = function
        return function(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Compute again, with a graph, and differentiate that."""
        tensors = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            recomputed = ctx.function(*tensors)
        return None, *torch.autograd.grad(recomputed, tensors, gradient)
