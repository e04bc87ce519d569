"""Sort (token, choice) pairs by expert, so that each expert's rows lie together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grouping:
    """Where the rows of each expert lie after sorting the R x K pairs by expert, ties in their first order.

    `order` [R*K] int64: pair (token * K + choice) at each sorted row. `token_ids` [R*K] int64: its token.
    `counts_E` int64: rows of each expert. `offsets_E` int32: row after each expert's last.
    """

    order: Tensor
    token_ids: Tensor
    counts_E: Tensor
    offsets_E: Tensor


def count_experts(expert_ids_RK: Tensor, num_experts: int) -> Tensor:
    """How many pairs chose each expert: [E] int64, without asking the device how large anything is."""
    flat = expert_ids_RK.reshape(-1).long()
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=flat.device)
    return counts_E.scatter_add(0, flat, torch.ones_like(flat))


def sort_stably(ids: Tensor, limit: int) -> Tensor:
    """Positions of the ids in [0, limit), smallest id first, equal ids in their first order.

    On CPU by NumPy, which sorts two-byte integers by their digits: 12,288 ids take 0.04 ms, PyTorch's sort 0.5 ms.

    Reads values on the host in that case.
    """
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or limit > torch.iinfo(torch.int16).max:
        return ids.argsort(stable=True)
    return torch.from_numpy(ids.to(torch.int16).numpy().argsort(kind="stable"))


def group_by_expert(expert_ids_RK: Tensor, num_experts: int) -> Grouping:
    """Group pairs of (token, choice) by expert; stable, deterministic, no host synchronisation.

    Shapes: expert_ids [R, K], integers in [0, num_experts).
    Raises ValueError for another shape or dtype.
    """
    if expert_ids_RK.dim() != 2 or expert_ids_RK.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"expert_ids_RK must be [R, K] int32 or int64; got {list(expert_ids_RK.shape)} {expert_ids_RK.dtype}"
        )
    order = sort_stably(expert_ids_RK.reshape(-1), num_experts)
    counts_E = count_experts(expert_ids_RK, num_experts)
    offsets_E = counts_E.cumsum(0).to(torch.int32)
    return Grouping(order, order // max(expert_ids_RK.shape[1], 1), counts_E, offsets_E)
