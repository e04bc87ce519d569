"""Sparse attention by PyTorch, a block of queries at a time: the scores of a block exist, those of a row never.

Backward of attention gathers the chosen keys once more; the losses make their gradients in forward and keep those of the
indexer's rows, which are narrow. All in float32 (float64 for float64): a choice by rounded scores would depend on shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from amfm.kernels.sparse_attention.reference import IndexRows, visible

# Queries of a block, and the numbers of its largest tensor, of which a block of fewer queries has at most so many.
_QUERIES, _NUMBERS = 128, 1 << 23


def query_blocks(tokens: int, numbers_per_query: int) -> Iterator[tuple[int, int]]:
    """Start and end of each block of queries."""
    size = max(1, min(_QUERIES, _NUMBERS // max(1, numbers_per_query)))
    for start in range(0, tokens, size):
        yield start, min(start + size, tokens)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def choose_keys(index: IndexRows, count: int, ids_BS: Tensor | None) -> Tensor:
    """By the lowest score that is taken: all above it, and of those equal to it the first."""
    (batch, tokens, heads, _), keys = index.q_BTIC.shape, index.k_BSC.shape[1]
    before, k_BSC = keys - tokens, _wide(index.k_BSC)
    found = []
    for start, stop in query_blocks(tokens, batch * heads * keys):
        end = before + stop
        products_BTIS = torch.einsum("btic,bsc->btis", _wide(index.q_BTIC[:, start:stop]), k_BSC[:, :end])
        scores_BTS = torch.einsum("bti,btis->bts", _wide(index.weight_BTI[:, start:stop]), products_BTIS.relu_())
        seen_BTS = visible(ids_BS, start, stop, before, k_BSC.device)
        scores_BTS = scores_BTS.masked_fill(~seen_BTS, -torch.inf)
        taken = min(count, end)
        least_BT1 = scores_BTS.topk(taken, dim=-1).values[..., -1:]
        is_above_BTS = scores_BTS > least_BT1
        is_equal_BTS = (scores_BTS == least_BT1) & seen_BTS
        room_BT1 = taken - is_above_BTS.sum(-1, keepdim=True)
        is_taken_BTS = is_above_BTS | (is_equal_BTS & (is_equal_BTS.cumsum(-1) <= room_BT1))
        # Where each goes; all others go to a last column that is dropped.
        column_BTS = torch.where(is_taken_BTS, is_taken_BTS.cumsum(-1) - 1, count)
        place_BTS = torch.arange(end, device=k_BSC.device).expand_as(column_BTS)
        spare_BTN = place_BTS.new_full((batch, stop - start, count + 1), -1)
        found.append(spare_BTN.scatter_(-1, column_BTS, place_BTS)[..., :count])
    return torch.cat(found, dim=1)


def _row_numbers(places_BTN: Tensor, keys: int) -> Tensor:
    """Number of each place in the keys of all rows end to end, flat; that of no key is some key's."""
    first_B = torch.arange(0, len(places_BTN) * keys, keys, device=places_BTN.device)
    return (places_BTN.clamp(min=0) + first_B[:, None, None]).flatten()


def _gather(x_BSX: Tensor, rows_R: Tensor, places_BTN: Tensor) -> Tensor:
    """x at the places, [B, T, N, ...], as whole rows of memory."""
    return _wide(x_BSX.flatten(0, 1).index_select(0, rows_R)).unflatten(0, places_BTN.shape)


def sparse_attention(
    q_BTHK: Tensor, k_BSJK: Tensor, v_BSJV: Tensor, places_BTN: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, T, H, V], weights of the chosen keys [B, T, N], log-sum-exps [B, T, H]."""
    outputs: tuple[Tensor, Tensor, Tensor] = _SparseAttention.apply(q_BTHK, k_BSJK, v_BSJV, places_BTN, scale)
    return outputs


class _SparseAttention(torch.autograd.Function):
    """Keeps q, k, v, the output and log-sum-exps; backward gathers again and adds to the keys that were read."""

    @staticmethod
    def forward(
        ctx: Any, q_BTHK: Tensor, k_BSJK: Tensor, v_BSJV: Tensor, places_BTN: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        keys, kv_heads = k_BSJK.shape[1:3]
        parts = []
        for start, stop in _attention_blocks(q_BTHK, k_BSJK, v_BSJV, places_BTN):
            places = places_BTN[:, start:stop]
            rows = _row_numbers(places, keys)
            q = _wide(q_BTHK[:, start:stop]).unflatten(2, (kv_heads, -1))
            scores = torch.einsum("btjrk,btnjk->btjrn", q, _gather(k_BSJK, rows, places)) * scale
            scores = scores.masked_fill_((places < 0)[:, :, None, None], -torch.inf)
            log_sums = scores.logsumexp(-1)
            weights = scores.sub_(log_sums[..., None]).exp_()
            o = torch.einsum("btjrn,btnjv->btjrv", weights, _gather(v_BSJV, rows, places))
            parts.append((o.flatten(2, 3).to(q_BTHK.dtype), weights.sum((2, 3)), log_sums.flatten(2)))
        o_BTHV, mass_BTN, log_sums_BTH = (torch.cat(each, dim=1) for each in zip(*parts))
        ctx.save_for_backward(q_BTHK, k_BSJK, v_BSJV, places_BTN, o_BTHV, log_sums_BTH)
        ctx.scale = scale
        ctx.mark_non_differentiable(mass_BTN, log_sums_BTH)
        return o_BTHV, mass_BTN, log_sums_BTH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o_BTHV: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        q_BTHK, k_BSJK, v_BSJV, places_BTN, o_BTHV, log_sums_BTH = ctx.saved_tensors
        keys, kv_heads = k_BSJK.shape[1:3]
        d_q_BTHK = torch.empty_like(q_BTHK)
        d_k_RJK, d_v_RJV = (torch.zeros_like(_wide(x.flatten(0, 1))) for x in (k_BSJK, v_BSJV))
        for start, stop in _attention_blocks(q_BTHK, k_BSJK, v_BSJV, places_BTN):
            part, places = slice(start, stop), places_BTN[:, start:stop]
            rows = _row_numbers(places, keys)
            q, d_o, o, log_sums = (
                _wide(x[:, part]).unflatten(2, (kv_heads, -1)) for x in (q_BTHK, d_o_BTHV, o_BTHV, log_sums_BTH)
            )
            k = _gather(k_BSJK, rows, places)
            weights = torch.einsum("btjrk,btnjk->btjrn", q, k).mul_(ctx.scale).sub_(log_sums[..., None]).exp_()
            weights.masked_fill_((places < 0)[:, :, None, None], 0.0)
            d_v = torch.einsum("btjrn,btjrv->btnjv", weights, d_o)
            d_scores = torch.einsum("btjrv,btnjv->btjrn", d_o, _gather(v_BSJV, rows, places))
            d_scores = d_scores.sub_((d_o * o).sum(-1, keepdim=True)).mul_(weights).mul_(ctx.scale)
            d_q_BTHK[:, part] = torch.einsum("btjrn,btnjk->btjrk", d_scores, k).flatten(2, 3)
            d_k = torch.einsum("btjrn,btjrk->btnjk", d_scores, q)
            d_k_RJK.index_add_(0, rows, d_k.flatten(0, 2))
            d_v_RJV.index_add_(0, rows, d_v.flatten(0, 2))
        d_k, d_v = (d.to(x.dtype).view_as(x) for d, x in ((d_k_RJK, k_BSJK), (d_v_RJV, v_BSJV)))
        return d_q_BTHK, d_k, d_v, None, None


def _attention_blocks(q_BTHK: Tensor, k_BSJK: Tensor, v_BSJV: Tensor, places_BTN: Tensor) -> Iterator[tuple[int, int]]:
    """Blocks by the gathered keys, values and scores of a query."""
    (batch, tokens, heads, size), count = q_BTHK.shape, places_BTN.shape[2]
    kv_heads, value_size = v_BSJV.shape[2:]
    return query_blocks(tokens, batch * count * max(heads, kv_heads * max(size, value_size)))


def chosen_loss(index: IndexRows, places_BTN: Tensor, mass_BTN: Tensor) -> Tensor:
    """Over the chosen keys, which are gathered."""
    loss: Tensor = _ChosenLoss.apply(*index, places_BTN, mass_BTN.detach(), torch.is_grad_enabled())
    return loss


def warm_up_loss(
    index: IndexRows,
    q_BTHK: Tensor,
    k_BSJK: Tensor,
    scale: float,
    ids_BS: Tensor | None,
    sum_heads: Callable[[Tensor], Tensor],
) -> Tensor:
    """Over all visible keys, with attention's scores made once more."""
    with_grad = torch.is_grad_enabled()
    loss: Tensor = _WarmUpLoss.apply(*index, q_BTHK, k_BSJK, scale, ids_BS, sum_heads, with_grad)
    return loss


class _Loss(torch.autograd.Function):
    """Scales the gradients of the indexer's rows that forward made."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        return (*(d * d_loss.to(d.dtype) for d in ctx.saved_tensors), *[None] * ctx.others)


class _ChosenLoss(_Loss):
    """Gathers the indexer's keys."""

    @staticmethod
    def forward(
        ctx: Any, q_BTIC: Tensor, k_BSC: Tensor, weight_BTI: Tensor, places_BTN: Tensor, mass: Tensor, with_grad: bool
    ) -> Tensor:
        batch, tokens, heads, size = q_BTIC.shape
        total, keys, count = _wide(q_BTIC).new_zeros(()), k_BSC.shape[1], places_BTN.shape[2]
        d_q, d_k, d_weight = _like(q_BTIC, k_BSC.flatten(0, 1), weight_BTI)
        for start, stop in query_blocks(tokens, batch * count * max(heads, size)):
            part, places = slice(start, stop), places_BTN[:, start:stop]
            rows = _row_numbers(places, keys)
            k, q, weight = _gather(k_BSC, rows, places), _wide(q_BTIC[:, part]), _wide(weight_BTI[:, part])
            products = torch.einsum("btic,btnc->btin", q, k)
            d_scores = _divergence(total, products, weight, _wide(mass[:, part]), places >= 0)
            if with_grad:
                d_weight[:, part] = torch.einsum("btn,btin->bti", d_scores, products.relu())
                d_products = d_scores[:, :, None] * weight[..., None] * (products > 0)
                d_q[:, part] = torch.einsum("btin,btnc->btic", d_products, k)
                d_k.index_add_(0, rows, torch.einsum("btin,btic->btnc", d_products, q).flatten(0, 2))
        return _keep_gradients(ctx, (q_BTIC, k_BSC, weight_BTI), (d_q, d_k, d_weight), total, with_grad, others=3)


class _WarmUpLoss(_Loss):
    """Makes the weights of dense attention, sums them over heads, and drops them."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BTIC: Tensor,
        k_BSC: Tensor,
        weight_BTI: Tensor,
        q_BTHK: Tensor,
        k_BSJK: Tensor,
        scale: float,
        ids_BS: Tensor | None,
        sum_heads: Callable[[Tensor], Tensor],
        with_grad: bool,
    ) -> Tensor:
        (batch, tokens, index_heads, _), (keys, kv_heads) = q_BTIC.shape, k_BSJK.shape[1:3]
        total, before = _wide(q_BTIC).new_zeros(()), keys - tokens
        d_q, d_k, d_weight = _like(q_BTIC, k_BSC, weight_BTI)
        # Tensor ranks cut the same blocks, because each has as many heads.
        for start, stop in query_blocks(tokens, batch * keys * max(index_heads, q_BTHK.shape[2])):
            part, end = slice(start, stop), before + stop
            seen = visible(ids_BS, start, stop, before, q_BTIC.device)
            heads = _wide(q_BTHK[:, part]).unflatten(2, (kv_heads, -1))
            scores = torch.einsum("btjrk,bsjk->bjrts", heads, _wide(k_BSJK[:, :end])).mul_(scale)
            target = sum_heads(scores.masked_fill_(~seen[:, None, None], -torch.inf).softmax(-1).sum((1, 2)))
            k, q, weight = _wide(k_BSC[:, :end]), _wide(q_BTIC[:, part]), _wide(weight_BTI[:, part])
            products = torch.einsum("btic,bsc->btis", q, k)
            d_scores = _divergence(total, products, weight, target, seen)
            if with_grad:
                d_weight[:, part] = torch.einsum("bts,btis->bti", d_scores, products.relu())
                d_products = d_scores[:, :, None] * weight[..., None] * (products > 0)
                d_q[:, part] = torch.einsum("btis,bsc->btic", d_products, k)
                d_k[:, :end] += torch.einsum("btis,btic->bsc", d_products, q)
        return _keep_gradients(ctx, (q_BTIC, k_BSC, weight_BTI), (d_q, d_k, d_weight), total, with_grad, others=6)


def _like(*rows: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.zeros_like(_wide(x)) for x in rows)


def _divergence(total: Tensor, products: Tensor, weight_BTI: Tensor, target: Tensor, seen: Tensor) -> Tensor:
    """Add the queries' KL(target / its sum || softmax of the scores) to `total`; returns the gradient of the scores."""
    scores = torch.einsum("bti,btis->bts", weight_BTI, products.relu())
    target = target / target.sum(-1, keepdim=True)
    log = scores.masked_fill_(~seen, -torch.inf).log_softmax(-1)
    total += (torch.xlogy(target, target) - target * log.masked_fill(~seen, 0.0)).sum()
    return log.exp() - target


def _keep_gradients(
    ctx: Any,
    rows: tuple[Tensor, ...],
    gradients: tuple[Tensor, ...],
    total: Tensor,
    with_grad: bool,
    *,
    others: int,
) -> Tensor:
    """Save gradients in the rows' dtypes; `others`: arguments after the rows."""
    ctx.others = others
    if with_grad:
        ctx.save_for_backward(*(d.to(x.dtype).view_as(x) for d, x in zip(gradients, rows)))
    return total
