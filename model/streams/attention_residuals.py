"""Attention residuals: each block reads a mixture of the embedding and of sums of earlier blocks' outputs, which it weighs itself.

Kimi Team 2026, arXiv 2603.15031: section 3.1 (equations 2 to 4) has the weights, section 3.2 (equations 5 and 6) the groups
of blocks whose outputs are one source, section 5 the first values. Blocks l = 0, 1, ... in groups of S:

    v_0 = embedding,  v_k = sum of the outputs of group k,  the last v_k as far as it has come
    a = softmax over k of query_l . (weight_l * v_k / rms(v_k)),  block l reads (number of sources) * sum_k a_k v_k
    before the final norm the same, with a query of its own

The paper's mixture is a mean of the sources, ours is as many times as large as there are sources. A norm follows, so it is
the same function but for that norm's epsilon; and with queries of zero, as they begin, it is the residual stream of a model
without them, so that both models begin equal.

What flows between blocks, in the places of residual and delta: the finished sources as one tensor [B, T, n, D], which all
blocks of a group share, and the sum of the running group's outputs [B, T, D]. Tokens do not meet, so context ranks and
sequence parallelism need nothing; a pipeline stage sends both as one tensor [B, T, n + 1, D].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from amfm.model.config.schema import ModelConfig
from amfm.model.config.streams import AttentionResidualsConfig
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.layers import stream_shard
from amfm.model.parallel.shards import own_shapes
from amfm.model.streams.interface import StreamReader


class AttentionResiduals(StreamReader):
    """What block `index` reads of the sources before it, and how its output joins them; the final norm has one, too.

    Parameters: the query [D], first 0, and the weight [D] of the keys' norm, first 1.
    """

    extra_repr = own_shapes

    def __init__(
        self, options: AttentionResidualsConfig, index: int, config: ModelConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__()
        self.begins_group = options.begins_group(index)
        self.epsilon = config.norm_epsilon
        self.query = nn.Parameter(torch.empty(config.hidden_size))
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.shards = {"query": stream_shard(groups), "weight": stream_shard(groups)}

    def add(self, sources_BTND: Tensor, running_BTD: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Sources and running sum before this block: with the group before it as a source where this block begins one.

        The stream before the first block, [B, T, D], is the only source [B, T, 1, D] then.
        """
        sources_BTND = _as_sources(sources_BTND)
        if running_BTD is None or not self.begins_group:
            return sources_BTND, running_BTD
        return self.send(sources_BTND, running_BTD), None

    def forward(self, sources_BTND: Tensor, running_BTD: Tensor | None) -> Tensor:
        """Mix sources [B, T, n, D] and the running sum [B, T, D], if there is one: [B, T, D] in their dtype."""
        wide = torch.promote_types(sources_BTND.dtype, torch.float32)
        mixed_BTD: Tensor = _Mixture.apply(
            self.query.to(wide) * self.weight.to(wide), _as_sources(sources_BTND), running_BTD, self.epsilon
        )
        return mixed_BTD

    def leave(self, y_BTD: Tensor, sources_BTND: Tensor, running_BTD: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sources, and the running sum with this block's output in their dtype."""
        y_BTD = y_BTD.to(sources_BTND.dtype)
        return sources_BTND, y_BTD if running_BTD is None else running_BTD + y_BTD

    def send(self, sources_BTND: Tensor, running_BTD: Tensor) -> Tensor:
        """One tensor [B, T, n + 1, D] of both, for the next pipeline stage."""
        return torch.cat([sources_BTND, running_BTD.to(sources_BTND.dtype).unsqueeze(2)], dim=2)

    def receive(self, sent_BTND: Tensor) -> tuple[Tensor, Tensor]:
        """Take apart what the stage before has sent."""
        return sent_BTND[:, :, :-1], sent_BTND[:, :, -1]

    def first_value(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A query of zero weighs all sources alike."""
        return torch.zeros(shape) if name == "query" else torch.ones(shape)


class _Mixture(torch.autograd.Function):
    """The mixture of n sources, of which a backward pass keeps the sources, as they are, and three numbers per token and source.

    Everything is computed in the dtype of the query: float32, or float64. With r = 1 / rms(v), s = r q . v, a = softmax(s),
    o = n sum a v and g = n do: ds = a (g . v - sum a g . v), dv = a g + ds r (q - s r v / D), dq = sum ds r v.
    """

    @staticmethod
    def forward(ctx: Any, query_D: Tensor, sources_BTND: Tensor, running_BTD: Tensor | None, epsilon: float) -> Tensor:
        """Score, weigh and add."""
        parts = _parts(sources_BTND, running_BTD, query_D.dtype)
        # Sums of squares without the squares in memory.
        squares_BTN = torch.cat([torch.linalg.vector_norm(part, dim=-1).square() for part in parts], dim=-1)
        inverse_BTN = (squares_BTN / query_D.numel() + epsilon).rsqrt()
        score_BTN = torch.cat([part @ query_D for part in parts], dim=-1) * inverse_BTN
        share_BTN = score_BTN.softmax(dim=-1)
        ctx.save_for_backward(query_D, sources_BTND, running_BTD, inverse_BTN, score_BTN, share_BTN)
        total = _weigh(share_BTN, parts)
        return (total * share_BTN.shape[-1]).to(sources_BTND.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_BTD: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the query, the sources and the running sum."""
        query_D, sources_BTND, running_BTD, inverse_BTN, score_BTN, share_BTN = ctx.saved_tensors
        parts = _parts(sources_BTND, running_BTD, query_D.dtype)
        g_BTD = gradient_BTD.to(query_D.dtype) * share_BTN.shape[-1]
        dot_BTN = torch.cat([(part @ g_BTD.unsqueeze(-1)).squeeze(-1) for part in parts], dim=-1)
        d_score_BTN = share_BTN * (dot_BTN - (share_BTN * dot_BTN).sum(-1, keepdim=True))
        of_query_BTN = d_score_BTN * inverse_BTN
        of_source_BTN = of_query_BTN * score_BTN * inverse_BTN / query_D.numel()
        d_query_D = _weigh(of_query_BTN, parts).sum(dim=(0, 1))
        found, start = [], 0
        for part in parts:
            own = slice(start, start + part.shape[2])
            start = own.stop
            share, of_query, of_source = (each[..., own, None] for each in (share_BTN, of_query_BTN, of_source_BTN))
            d_part = (share * g_BTD.unsqueeze(2)).addcmul_(of_query, query_D).addcmul_(of_source, part, value=-1)
            found.append(d_part.to(sources_BTND.dtype))
        return d_query_D, found[0], found[1].squeeze(2) if running_BTD is not None else None, None


def _as_sources(stream: Tensor) -> Tensor:
    """The stream before the first block, [B, T, D], as one source."""
    return stream.unsqueeze(2) if stream.dim() == 3 else stream


def _parts(sources_BTND: Tensor, running_BTD: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """The sources, and the running sum as one more, in the dtype of the computation."""
    running = [] if running_BTD is None else [running_BTD.unsqueeze(2)]
    return [part.to(dtype) for part in (sources_BTND, *running)]


def _weigh(weights_BTN: Tensor, parts: list[Tensor]) -> Tensor:
    """Sum the sources times their weights, [B, T, D]."""
    total, start = torch.zeros((), dtype=weights_BTN.dtype, device=weights_BTN.device), 0
    for part in parts:
        own_BT1N = weights_BTN[..., start : start + part.shape[2]].unsqueeze(-2)
        total, start = total + (own_BT1N @ part).squeeze(-2), start + part.shape[2]
    return total
