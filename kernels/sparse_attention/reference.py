"""Sparse attention with its whole [T, S] scores: the meaning the fast paths must keep, gradients by autograd. For tests.

`IndexRows` is what an indexer gives of a row, for every form, and `visible` which keys of it a block of queries sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Of the Triton kernels' tiles: heads in forward, which fetches chosen keys once for each tile, and in backward, where the
# gradients of scores are read once for each tile of channels.
FORWARD_HEADS, SLOPE_HEADS, SUM_CHANNELS = 32, 128, 128


class IndexRows(NamedTuple):
    """Score of query t and key s: sum over heads i of weight_ti relu(q_ti . k_s).

    q [B, T, I, C], one key head k [B, S, C] of which the last T are those of the queries, weight [B, T, I].
    """

    q_BTIC: Tensor
    k_BSC: Tensor
    weight_BTI: Tensor

    def after(self, known_BSC: Tensor | None) -> IndexRows:
        """The same queries, whose keys continue those of a cache."""
        assert known_BSC is not None, "a cache of keys that are chosen has the indexer's"
        return self._replace(k_BSC=torch.cat([known_BSC, self.k_BSC], dim=1))


def keep(part: Tensor) -> Tensor:
    """Nothing to add from elsewhere."""
    return part


def visible(ids_BS: Tensor | None, start: int, stop: int, before: int, device: torch.device) -> Tensor:
    """Whether queries start to stop see the keys before the last of them: [B or 1, queries, before + stop] bool.

    Query t stands at key before + t.
    """
    place_S = torch.arange(before + stop, device=device)
    seen_1TS = (place_S <= place_S[before + start :, None])[None]
    if ids_BS is None:
        return seen_1TS
    return seen_1TS & (ids_BS[:, before + start : before + stop, None] == ids_BS[:, None, : before + stop])


def _scores(index: IndexRows) -> Tensor:
    products_BTIS = torch.einsum("btic,bsc->btis", index.q_BTIC, index.k_BSC)
    return torch.einsum("bti,btis->bts", index.weight_BTI, products_BTIS.relu())


def _seen(index: IndexRows, ids_BS: Tensor | None) -> Tensor:
    tokens, keys = index.q_BTIC.shape[1], index.k_BSC.shape[1]
    return visible(ids_BS, 0, tokens, keys - tokens, index.k_BSC.device).expand(len(index.k_BSC), -1, -1)


@torch.no_grad()
def choose_keys(index: IndexRows, count: int, ids_BS: Tensor | None) -> Tensor:
    """A stable sort, whose equals keep their order; then the places in the order of the row."""
    seen_BTS = _seen(index, ids_BS)
    scores_BTS = _scores(index).masked_fill(~seen_BTS, -torch.inf)
    order_BTS = scores_BTS.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    last = torch.iinfo(torch.int64).max
    found_BTN = order_BTS.masked_fill(~seen_BTS.gather(-1, order_BTS), last).sort(dim=-1).values
    return found_BTN.masked_fill(found_BTN == last, -1)


def _mask(places_BTN: Tensor, keys: int) -> Tensor:
    """The choice as a mask [B, T, S] bool."""
    spare_BTS = torch.zeros(*places_BTN.shape[:2], keys + 1, dtype=torch.bool, device=places_BTN.device)
    return spare_BTS.scatter(-1, torch.where(places_BTN < 0, keys, places_BTN), True)[..., :keys]


def _weights(q_BTHK: Tensor, k_BSJK: Tensor, seen_BTS: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Weights of attention [B, H, T, S], and log-sum-exps [B, H, T]."""
    k_BSHK = k_BSJK.repeat_interleave(q_BTHK.shape[2] // k_BSJK.shape[2], 2)
    scores_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) * scale
    scores_BHTS = scores_BHTS.masked_fill(~seen_BTS[:, None], -torch.inf)
    return scores_BHTS.softmax(-1), scores_BHTS.logsumexp(-1)


def sparse_attention(
    q_BTHK: Tensor, k_BSJK: Tensor, v_BSJV: Tensor, places_BTN: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention with all keys masked that were not chosen."""
    weights_BHTS, log_sums_BHT = _weights(q_BTHK, k_BSJK, _mask(places_BTN, k_BSJK.shape[1]), scale)
    v_BSHV = v_BSJV.repeat_interleave(q_BTHK.shape[2] // v_BSJV.shape[2], 2)
    o_BTHV = torch.einsum("bhts,bshv->bthv", weights_BHTS, v_BSHV)
    mass_BTN = weights_BHTS.detach().sum(1).gather(-1, places_BTN.clamp(min=0)).masked_fill(places_BTN < 0, 0.0)
    return o_BTHV, mass_BTN, log_sums_BHT.transpose(1, 2)


def _divergence(target_BTS: Tensor, scores_BTS: Tensor, seen_BTS: Tensor) -> Tensor:
    target_BTS = target_BTS / target_BTS.sum(-1, keepdim=True)
    log_BTS = scores_BTS.masked_fill(~seen_BTS, -torch.inf).log_softmax(-1).masked_fill(~seen_BTS, 0.0)
    return (torch.xlogy(target_BTS, target_BTS) - target_BTS * log_BTS).sum()


def chosen_loss(index: IndexRows, places_BTN: Tensor, mass_BTN: Tensor) -> Tensor:
    """Over the chosen keys of the whole scores."""
    scores_BTN = _scores(index).gather(-1, places_BTN.clamp(min=0))
    return _divergence(mass_BTN.detach(), scores_BTN, places_BTN >= 0)


def warm_up_loss(
    index: IndexRows,
    q_BTHK: Tensor,
    k_BSJK: Tensor,
    scale: float,
    ids_BS: Tensor | None,
    sum_heads: Callable[[Tensor], Tensor],
) -> Tensor:
    """Over all visible keys."""
    seen_BTS = _seen(index, ids_BS)
    target_BTS = sum_heads(_weights(q_BTHK, k_BSJK, seen_BTS, scale)[0].sum(1).detach())
    return _divergence(target_BTS, _scores(index), seen_BTS)
