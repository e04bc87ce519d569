"""Recycled choices in three launches: the draw of `capacity.recycle_overflow`, bitwise.

Blocks of choices count their experts and hash what they chose. Then each block knows from the counts of all blocks which of its
choices are over capacity, and lists them in order, while other programs put each free seat to its place in the random order:
the number of free seats whose hash is smaller, counted, since a sort would be launches of its own. One program draws: what waits
and what is free are short lists by then, so the n-th of either is an index, and PyTorch's searches for it are not needed.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201, ANN202

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from amfm.kernels.moe.counting_sort import ROWS, sort_tile
from amfm.kernels.runtime.backend import INTERPRETED

# Seats that a program puts in order, and those that it compares them with at a time.
SEAT_TILE = {"OWN": 16, "SEATS": 64} if INTERPRETED else {"OWN": 64, "SEATS": 64}
# Waiting choices, or free seats, that the drawing program takes at a time.
DRAW_TILE = {"BLOCK": 32} if INTERPRETED else {"BLOCK": 2048, "num_warps": 16}


@triton.jit
def mix_bits(values):
    """`capacity.mix_bits`: shifts without the sign, which int64 has to mask away."""
    values = (values ^ ((values >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    values = (values ^ ((values >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return values ^ ((values >> 31) & 0x1FFFFFFFF)


@triton.jit(do_not_specialize=["seed", "pairs"])
def hash_choices_kernel(
    ids, seed, counts, hashes, pairs, experts, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, SUB: tl.constexpr
):  # fmt: skip
    """counts [blocks, E] as `count_pairs_kernel`, and hashes [blocks] int64: each block's part of the salt. Grid: blocks."""
    block = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    salt = mix_bits(seed.to(tl.int64))
    total = tl.zeros((EXPERTS,), tl.int32)
    mixed = tl.zeros((SUB,), tl.int64)
    for begin in range(block * BLOCK, tl.minimum(block * BLOCK + BLOCK, pairs), SUB):
        pair = begin + tl.arange(0, SUB)
        chosen = tl.load(ids + pair, mask=pair < pairs, other=-1).to(tl.int32)
        total += tl.sum((chosen[:, None] == expert[None, :]).to(tl.int32), 0)
        mixed += tl.where(pair < pairs, mix_bits(pair.to(tl.int64) * experts + chosen + salt), 0)
    tl.store(counts + block * experts + expert, total, mask=expert < experts)
    tl.store(hashes + block, tl.sum(mixed, 0))


@triton.jit(do_not_specialize=["pairs", "capacity", "blocks", "strips"])
def order_seats_kernel(
    ids, counts, hashes, kept, waiting, order, ends, state, pairs, experts, capacity, blocks, strips,
    EXPERTS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, SUB: tl.constexpr, ROWS: tl.constexpr,
    OWN: tl.constexpr, SEATS: tl.constexpr,
):  # fmt: skip
    """kept [S] as `limit_pairs_kernel`, waiting: the pairs over capacity in order, and order: experts of free seats by hash.

    Grid: blocks of pairs, then `strips` programs of OWN seats for each expert. state [3]: salt, pairs that wait, free seats.
    ends [seat programs, E]: a program's own list of the number of free seats up to each expert's last.
    """
    program = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), tl.int32)
    before = tl.zeros((EXPERTS,), tl.int32)
    mixed = tl.zeros((ROWS,), tl.int64)
    for first in range(0, blocks, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row[:, None] < blocks) & (expert[None, :] < experts)
        tile = tl.load(counts + row[:, None] * experts + expert[None, :], mask=inside, other=0)
        total += tl.sum(tile, 0)
        before += tl.sum(tl.where(row[:, None] < program, tile, 0), 0)
        mixed += tl.load(hashes + row, mask=row < blocks, other=0)
    salt = tl.sum(mixed, 0)
    taken = tl.minimum(total, capacity)
    free = tl.where(expert < experts, capacity - taken, 0)
    num_waiting, num_free = tl.sum(total - taken, 0), tl.sum(free, 0)
    if program == 0:
        tl.store(state, salt)
        tl.store(state + 1, num_waiting.to(tl.int64))
        tl.store(state + 2, num_free.to(tl.int64))
    if program < blocks:
        # An expert's pairs beyond the first `capacity` wait, those of earlier blocks before these.
        position = tl.sum(tl.maximum(before - capacity, 0), 0)
        lane = tl.arange(0, SUB)
        for begin in range(program * BLOCK, tl.minimum(program * BLOCK + BLOCK, pairs), SUB):
            pair = begin + lane
            chosen = tl.load(ids + pair, mask=pair < pairs, other=-1).to(tl.int32)
            mine = chosen[:, None] == expert[None, :]
            earlier = (chosen[:, None] == chosen[None, :]) & (lane[None, :] < lane[:, None])
            number = tl.sum(tl.where(mine, before[None, :], 0), 1) + tl.sum(earlier.to(tl.int32), 1)
            waits = (pair < pairs) & (number >= capacity)
            tl.store(kept + pair, tl.where(waits, experts, chosen).to(kept.dtype.element_ty), mask=pair < pairs)
            place = position + tl.cumsum(waits.to(tl.int32), 0) - 1
            tl.store(waiting + place, pair, mask=waits)
            before += tl.sum(mine.to(tl.int32), 0)
            position += tl.sum(waits.to(tl.int32), 0)
    else:
        strip = program - blocks
        own = strip // strips
        place = strip % strips * OWN + tl.arange(0, OWN)
        filled = tl.sum(tl.where(expert == own, taken, 0), 0)
        if (num_waiting > 0) & (strip % strips * OWN + OWN > filled):
            seat = own.to(tl.int64) * capacity + place
            key = mix_bits(salt + seat) & 0x7FFFFFFFFFFFFFFF
            mine = ends + strip.to(tl.int64) * experts
            tl.store(mine + expert, tl.cumsum(free, 0), mask=expert < experts)
            tl.debug_barrier()
            rank = tl.zeros((OWN,), tl.int32)
            for begin in range(0, num_free, SEATS):
                number = begin + tl.arange(0, SEATS)
                inside = number < num_free
                # Whose seat it is: the experts whose free seats end before it, by bisection.
                passed = tl.zeros((SEATS,), tl.int32)
                for bit in tl.static_range(BITS):
                    further = passed + (EXPERTS >> (bit + 1))
                    end = tl.load(mine + further - 1, mask=inside & (further <= experts), other=2147483647)
                    passed = tl.where(end <= number, further, passed)
                end = tl.load(mine + passed, mask=inside, other=0)
                other = passed.to(tl.int64) * capacity + (capacity - (end - number))
                other_key = mix_bits(salt + other) & 0x7FFFFFFFFFFFFFFF
                smaller = other_key[None, :] < key[:, None]
                smaller |= (other_key[None, :] == key[:, None]) & (other[None, :] < seat[:, None])
                rank += tl.sum((smaller & inside[None, :]).to(tl.int32), 1)
            tl.store(order + rank, tl.zeros((OWN,), tl.int32) + own, mask=(place >= filled) & (place < capacity))


@triton.jit
def _offer(order, number, turn, num_waiting, num_free):
    """Experts that the waiting choices of these numbers are offered, -1 for none."""
    place = number + turn
    place = tl.where(place >= num_free, place - num_free, place)
    given = (number >= 0) & (number < num_waiting) & (number < num_free)
    return tl.load(order + place, mask=given, other=-1)


@triton.jit
def draw_seats_kernel(
    state, kept, waiting, still_waiting, order, still_free, is_new, choices, ROUNDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Give free seats to what waits, in ROUNDS rounds: writes their experts into `kept`. One program.

    Each round reads one list of what waits and of what is free and writes another, so that nothing is read where it is written.
    """
    salt = tl.load(state)
    num_waiting, num_free = tl.load(state + 1).to(tl.int32), tl.load(state + 2).to(tl.int32)
    for _round in tl.static_range(ROUNDS):
        salt = mix_bits(salt)
        turn = ((salt & 0x7FFFFFFFFFFFFFFF) % tl.maximum(num_free, 1).to(tl.int64)).to(tl.int32)
        for begin in range(0, num_waiting, BLOCK):
            number = begin + tl.arange(0, BLOCK)
            inside = number < num_waiting
            pair = tl.load(waiting + number, mask=inside, other=0)
            offered = _offer(order, number, turn, num_waiting, num_free)
            given = offered >= 0
            for choice in range(choices):
                has = tl.load(kept + pair // choices * choices + choice, mask=inside, other=-1).to(tl.int32)
                given &= has != offered
            # What waits is in order, so choices of the same token that come first are just before.
            for back in range(1, choices):
                first = tl.load(waiting + number - back, mask=inside & (number >= back), other=-1)
                same = (first >= 0) & (first // choices == pair // choices)
                given &= ~(same & (_offer(order, number - back, turn, num_waiting, num_free) == offered))
            tl.store(is_new + number, given.to(tl.int32), mask=inside)
        tl.debug_barrier()
        left = 0
        for begin in range(0, num_waiting, BLOCK):
            number = begin + tl.arange(0, BLOCK)
            inside = number < num_waiting
            pair = tl.load(waiting + number, mask=inside, other=0)
            given = tl.load(is_new + number, mask=inside, other=0) != 0
            offered = _offer(order, number, turn, num_waiting, num_free)
            tl.store(kept + pair, offered.to(kept.dtype.element_ty), mask=given)
            stays = (inside & ~given).to(tl.int32)
            tl.store(still_waiting + left + tl.cumsum(stays, 0) - 1, pair, mask=stays != 0)
            left += tl.sum(stays, 0)
        room = 0
        for begin in range(0, tl.where(left > 0, num_free, 0), BLOCK):
            number = begin + tl.arange(0, BLOCK)
            inside = number < num_free
            asked = tl.where(number < turn, number - turn + num_free, number - turn)
            given = tl.load(is_new + asked, mask=inside & (asked < num_waiting), other=0) != 0
            stays = (inside & ~given).to(tl.int32)
            expert = tl.load(order + number, mask=inside, other=0)
            tl.store(still_free + room + tl.cumsum(stays, 0) - 1, expert, mask=stays != 0)
            room += tl.sum(stays, 0)
        tl.debug_barrier()
        num_waiting, num_free = left, room
        waiting, still_waiting = still_waiting, waiting
        order, still_free = still_free, order


@torch.library.custom_op("amfm::recycle_pairs_triton", mutates_args=())
def recycle_pairs(expert_ids_RK: Tensor, num_experts: int, capacity: int, seed: Tensor, rounds: int) -> Tensor:
    """As `capacity.recycle_overflow`, in three launches; the seed is read here, so it is on the CPU."""
    ids = expert_ids_RK.contiguous()
    kept, size, seats = torch.empty_like(ids), ids.numel(), num_experts * capacity
    if not size:
        return kept
    tile = sort_tile(size)
    blocks, strips = triton.cdiv(size, tile["BLOCK"]), triton.cdiv(capacity, SEAT_TILE["OWN"])
    padded = triton.next_power_of_2(num_experts)
    counts, hashes = ids.new_empty(blocks, num_experts, dtype=torch.int32), ids.new_empty(blocks, dtype=torch.int64)
    hash_choices_kernel[(blocks,)](ids, int(seed), counts, hashes, size, num_experts, EXPERTS=padded, **tile)
    state = ids.new_empty(3, dtype=torch.int64)
    ends = ids.new_empty(num_experts * strips, num_experts, dtype=torch.int32)
    waiting, order = ids.new_empty(2, size, dtype=torch.int32), ids.new_empty(2, seats, dtype=torch.int32)
    order_seats_kernel[(blocks + len(ends),)](
        ids, counts, hashes, kept, waiting, order, ends, state, size, num_experts, capacity, blocks, strips,
        EXPERTS=padded, BITS=padded.bit_length() - 1, ROWS=ROWS, **tile, **SEAT_TILE,
    )  # fmt: skip
    is_new = ids.new_empty(size, dtype=torch.int32)
    draw_seats_kernel[(1,)](state, kept, *waiting, *order, is_new, ids.shape[1], ROUNDS=rounds, **DRAW_TILE)
    return kept


@recycle_pairs.register_fake
def _(expert_ids_RK: Tensor, num_experts: int, capacity: int, seed: Tensor, rounds: int) -> Tensor:
    return expert_ids_RK.new_empty(expert_ids_RK.shape)
