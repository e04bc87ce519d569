"""A limit to the choices that an expert takes of one batch: what is over it is lost, or goes to an expert with room.

A limit keeps the work of each expert even, at the price of tokens whose choice is lost. Both forms are
functions of only the choices, without host synchronisation, so that they can run inside a captured or
recomputed forward pass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from amfm.kernels.moe.grouping import count_experts, group_by_expert
from amfm.kernels.runtime.backend import resolve_backend

ROUNDS = 4  # of drawing seats; a choice without one after them is lost
LARGEST = 2**63 - 1


def expert_capacity(tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """The choices that one expert takes of `tokens` tokens: `factor` times an even share, rounded up."""
    return math.ceil(factor * tokens * top_k / num_experts)


def drop_overflow(expert_ids_RK: Tensor, num_experts: int, capacity: int, *, backend: str = "torch") -> Tensor:
    """The choices [R, K] with those over capacity set to `num_experts`, which stands for a lost choice.

    An expert takes choices in the order of tokens, so what becomes of a token depends on none that comes after it.
    """
    if resolve_backend(backend, expert_ids_RK.device, "moe") == "triton":
        from amfm.kernels.moe.counting_sort import limit_pairs

        return limit_pairs(expert_ids_RK, num_experts, capacity)
    groups = group_by_expert(expert_ids_RK, num_experts)
    sorted_ids_S = expert_ids_RK.flatten()[groups.order]
    place_S = torch.arange(len(sorted_ids_S), device=expert_ids_RK.device)
    place_S = place_S - (groups.offsets_E - groups.counts_E)[sorted_ids_S]
    kept_S = torch.where(place_S < capacity, sorted_ids_S, num_experts)
    return torch.empty_like(kept_S).index_copy_(0, groups.order, kept_S).view_as(expert_ids_RK)


def recycle_overflow(
    expert_ids_RK: Tensor, num_experts: int, capacity: int, seed: Tensor, *, backend: str = "torch"
) -> Tensor:
    """As `drop_overflow`, but a choice over capacity gets a free seat of another expert, drawn at random.

    A seat with an expert that its token has already is given back and drawn again, `ROUNDS` times in all; a choice that
    is then without a seat is lost. The draw is a function of the seed (int64, of no dimension, on the CPU) and of all choices: it needs
    no state, and a second forward pass over the same batch draws alike.
    Source: Sun et al. 2024, Hunyuan-Large (arXiv 2411.02265), paragraph "Recycle Routing".
    """
    device, shape_RK = expert_ids_RK.device, expert_ids_RK.shape
    if resolve_backend(backend, device, "moe") == "triton":
        from amfm.kernels.moe.recycling import recycle_pairs

        return recycle_pairs(expert_ids_RK, num_experts, capacity, seed, ROUNDS)
    kept_S = drop_overflow(expert_ids_RK, num_experts, capacity, backend=backend).flatten()
    taken_E = count_experts(kept_S[:, None], num_experts + 1)[:num_experts]
    seats = torch.arange(num_experts * capacity, device=device)
    is_free = seats % capacity >= taken_E[seats // capacity]
    # The salt depends on every choice of the batch, so that different batches draw differently.
    numbers_S = torch.arange(len(kept_S), device=device) * num_experts + expert_ids_RK.flatten()
    salt = mix_bits(numbers_S + mix_bits(seed)).sum()
    # The one sort of the draw: free seats first, in a random order.
    drawn = torch.where(is_free, mix_bits(salt + seats) & LARGEST, LARGEST).argsort()
    drawn_experts, is_free = drawn // capacity, is_free[drawn]
    for _ in range(ROUNDS):
        salt = mix_bits(salt)
        is_waiting_S = kept_S == num_experts
        waited_S, freed = is_waiting_S.cumsum(0), is_free.cumsum(0)
        num_waiting, num_free = waited_S[-1], freed[-1]
        # The n-th that waits is offered the n-th free seat from a random one on, around the end. Places are found by
        # counting: writing to them would be another sort where sums must have one order.
        turn = (salt & LARGEST) % num_free.clamp(min=1)
        number_S = waited_S - 1
        seat_S = find_nth(freed, (number_S + turn) % num_free.clamp(min=1))
        is_offered_S = is_waiting_S & (number_S < num_free)
        offered_S = torch.where(is_offered_S, drawn_experts[seat_S], num_experts)
        offered_RK = offered_S.view(shape_RK)
        is_new_S = ((offered_RK < num_experts) & ~_is_repeated(offered_RK, kept_S.view(shape_RK))).flatten()
        kept_S = torch.where(is_new_S, offered_S, kept_S)
        # Which waiting choice a free seat was offered to, and whether that took it.
        asked = (freed - 1 - turn) % num_free.clamp(min=1)
        is_taken = (asked < num_waiting) & is_new_S[find_nth(waited_S, asked)]
        is_free = is_free & ~is_taken
    return kept_S.view(shape_RK)


def find_nth(counted: Tensor, numbers: Tensor) -> Tensor:
    """Places of the marks with these numbers, from 0, in a row of marks whose running count is `counted`; some place beyond."""
    return torch.searchsorted(counted, numbers + 1).clamp(max=len(counted) - 1)


def mix_bits(values: Tensor) -> Tensor:
    """A well-mixed int64 of each int64, the same on every device.

    Source: the finalizer of SplitMix64 (Steele, Lea and Flood 2014, doi 10.1145/2660193.2660195, figure 17).
    """
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        values = (values ^ _shift_right(values, shift)) * factor
    return values ^ _shift_right(values, 31)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Without copying the sign.

    PyTorch has no unsigned 64 bit integers to shift.
    """
    return (values >> bits) & (LARGEST >> (bits - 1))


def _is_repeated(offered_RK: Tensor, ids_RK: Tensor) -> Tensor:
    """Whether a token has the expert that it is offered, or is offered it a second time."""
    has_RK = (offered_RK[:, :, None] == ids_RK[:, None, :]).any(-1)
    earlier_KK = torch.ones(ids_RK.shape[1], ids_RK.shape[1], dtype=torch.bool, device=ids_RK.device).tril(-1)
    return has_RK | ((offered_RK[:, :, None] == offered_RK[:, None, :]) & earlier_KK).any(-1)
