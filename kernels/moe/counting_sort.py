"""Sort (token, choice) pairs by expert in two launches, and list the tiles that a layer's grouped products take.

A counting sort: blocks of pairs count their experts, then each block knows where its pairs go from the counts of all blocks
before it. Stable and without atomics, so the order is that of `grouping.group_by_expert` bitwise. PyTorch's sort is a
radix sort over 64-bit numbers, and the counts, ends and inverse around it are ten launches more.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from amfm.kernels.runtime.backend import INTERPRETED

# Pairs of a program at least, and those that it takes at a time.
SORT_TILE = {"BLOCK": 64, "SUB": 16} if INTERPRETED else {"BLOCK": 512, "SUB": 32}
# Blocks that pairs are cut into at most.
MOST_BLOCKS = 16 if INTERPRETED else 1024
# Blocks whose counts are added at a time, and tiles that a program lists.
ROWS = 16
LIMIT_BLOCK = 64 if INTERPRETED else 1024


@dataclass(frozen=True)
class SortedPairs:
    """Pairs (token * K + choice) sorted by expert, ties in their first order; all int32 but the counts.

    `pairs` [S]: pair at each sorted place. `tokens` [S]: its token. `places` [S]: sorted place of each pair. `counts_E` int64:
    pairs of each expert. `offsets_E`: place after each expert's last.
    """

    pairs: Tensor
    tokens: Tensor
    places: Tensor
    counts_E: Tensor
    offsets_E: Tensor


def sort_tile(pairs: int) -> dict[str, int]:
    """Pairs of a program, of which more get larger blocks: every program reads the counts of all blocks."""
    block = triton.next_power_of_2(triton.cdiv(pairs, MOST_BLOCKS))
    return SORT_TILE | {"BLOCK": max(SORT_TILE["BLOCK"], block)}


@triton.jit(do_not_specialize=["pairs"])
def count_pairs_kernel(
    ids, counts, pairs, experts, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, SUB: tl.constexpr
):  # fmt: skip
    """counts [blocks, E]: pairs of each expert in each block of BLOCK pairs. Grid: blocks."""
    block = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), tl.int32)
    for begin in range(block * BLOCK, tl.minimum(block * BLOCK + BLOCK, pairs), SUB):
        pair = begin + tl.arange(0, SUB)
        chosen = tl.load(ids + pair, mask=pair < pairs, other=-1).to(tl.int32)
        total += tl.sum((chosen[:, None] == expert[None, :]).to(tl.int32), 0)
    tl.store(counts + block * experts + expert, total, mask=expert < experts)


@triton.jit(do_not_specialize=["pairs", "blocks"])
def place_pairs_kernel(
    ids, counts, sorted_pairs, tokens, places, totals, offsets, pairs, experts, blocks, choices,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, SUB: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write each pair to its sorted place, and the place to the pair; the first program writes counts and ends of experts.

    Grid: blocks. A pair's place: the pairs of smaller experts, those of its own in earlier blocks, and those before it here.
    """
    block = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), tl.int32)
    before = tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, blocks, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        inside = (row < blocks) & (expert[None, :] < experts)
        tile = tl.load(counts + row * experts + expert[None, :], mask=inside, other=0)
        total += tl.sum(tile, 0)
        before += tl.sum(tl.where(row < block, tile, 0), 0)
    ends = tl.cumsum(total, 0)
    if block == 0:
        tl.store(totals + expert, total.to(tl.int64), mask=expert < experts)
        tl.store(offsets + expert, ends, mask=expert < experts)
    free = ends - total + before
    lane = tl.arange(0, SUB)
    for begin in range(block * BLOCK, tl.minimum(block * BLOCK + BLOCK, pairs), SUB):
        pair = begin + lane
        chosen = tl.load(ids + pair, mask=pair < pairs, other=-1).to(tl.int32)
        mine = chosen[:, None] == expert[None, :]
        earlier = (chosen[:, None] == chosen[None, :]) & (lane[None, :] < lane[:, None])
        place = tl.sum(tl.where(mine, free[None, :], 0), 1) + tl.sum(earlier.to(tl.int32), 1)
        tl.store(sorted_pairs + place, pair, mask=pair < pairs)
        tl.store(tokens + place, pair // choices, mask=pair < pairs)
        tl.store(places + pair, place, mask=pair < pairs)
        free += tl.sum(mine.to(tl.int32), 0)


@triton.jit(do_not_specialize=["bound"])
def list_tiles_kernel(
    offsets, tiles, experts, bound, EXPERTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """tiles [bound, 3]: expert of each tile (`experts` beyond the last), its first row, the row after the expert's last.

    Grid: blocks of ROWS tiles. No tile has rows of two experts.
    """
    expert = tl.arange(0, EXPERTS)
    ends = tl.load(offsets + expert, mask=expert < experts, other=0)
    begins = tl.load(offsets + expert - 1, mask=(expert > 0) & (expert < experts), other=0)
    needed = tl.where(expert < experts, (ends - begins + BLOCK_M - 1) // BLOCK_M, 0)
    tile_ends = tl.cumsum(needed, 0)
    tile = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    passed = (tile_ends[None, :] <= tile[:, None]) & (expert[None, :] < experts)
    mine = tl.sum(passed.to(tl.int32), 1)
    here = expert[None, :] == mine[:, None]
    first = tl.sum(tl.where(here, begins[None, :], 0), 1)
    first += (tile - tl.sum(tl.where(here, (tile_ends - needed)[None, :], 0), 1)) * BLOCK_M
    tl.store(tiles + tile * 3, mine, mask=tile < bound)
    tl.store(tiles + tile * 3 + 1, first, mask=tile < bound)
    tl.store(tiles + tile * 3 + 2, tl.sum(tl.where(here, ends[None, :], 0), 1), mask=tile < bound)


@triton.jit(do_not_specialize=["pairs"])
def limit_pairs_kernel(ids, places, offsets, kept, pairs, experts, capacity, BLOCK: tl.constexpr):
    """kept [S]: each pair's expert, or `experts` where `capacity` earlier pairs of that expert have filled it. Grid: blocks."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    expert = tl.load(ids + pair, mask=inside, other=0).to(tl.int32)
    begin = tl.load(offsets + expert - 1, mask=inside & (expert > 0), other=0)
    number = tl.load(places + pair, mask=inside, other=0) - begin
    tl.store(kept + pair, tl.where(number < capacity, expert, experts).to(kept.dtype.element_ty), mask=inside)


def tile_bound(rows: int, experts: int, height: int) -> int:
    """Most tiles of `height` rows that `rows` sorted rows can need: each expert wastes less than one."""
    return -(-rows // height) + min(experts, rows)


def list_tiles(offsets_E: Tensor, rows: int, height: int) -> Tensor:
    """Tiles of `height` rows over experts' `rows` rows, [bound, 3] int32: what products of a layer share (`list_tiles_kernel`)."""
    experts = len(offsets_E)
    bound = tile_bound(rows, experts, height)
    tiles = offsets_E.new_empty(bound, 3)
    list_tiles_kernel[(triton.cdiv(bound, ROWS),)](
        offsets_E, tiles, experts, bound, EXPERTS=triton.next_power_of_2(experts), ROWS=ROWS, BLOCK_M=height
    )
    return tiles


@torch.library.custom_op("amfm::sort_pairs_triton", mutates_args=())
def _sort(expert_ids_RK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `SortedPairs`, in their order."""
    ids = expert_ids_RK.contiguous()
    size = ids.numel()
    pairs, tokens, places = (ids.new_empty(size, dtype=torch.int32) for _ in range(3))
    totals, offsets = ids.new_empty(num_experts, dtype=torch.int64), ids.new_empty(num_experts, dtype=torch.int32)
    if size == 0:
        return pairs, tokens, places, totals.zero_(), offsets.zero_()
    tile = sort_tile(size)
    blocks = triton.cdiv(size, tile["BLOCK"])
    counts = ids.new_empty(blocks, num_experts, dtype=torch.int32)
    padded = triton.next_power_of_2(num_experts)
    count_pairs_kernel[(blocks,)](ids, counts, size, num_experts, EXPERTS=padded, **tile)
    place_pairs_kernel[(blocks,)](
        ids, counts, pairs, tokens, places, totals, offsets, size, num_experts, blocks, ids.shape[1],
        EXPERTS=padded, ROWS=ROWS, **tile,
    )  # fmt: skip
    return pairs, tokens, places, totals, offsets


@_sort.register_fake
def _(expert_ids_RK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    pairs, tokens, places = (expert_ids_RK.new_empty(expert_ids_RK.numel(), dtype=torch.int32) for _ in range(3))
    counts = expert_ids_RK.new_empty(num_experts, dtype=torch.int64)
    return pairs, tokens, places, counts, expert_ids_RK.new_empty(num_experts, dtype=torch.int32)


def sort_pairs(expert_ids_RK: Tensor, num_experts: int) -> SortedPairs:
    """Sort the pairs of expert ids [R, K], integers in [0, num_experts), by expert; no host synchronisation."""
    return SortedPairs(*_sort(expert_ids_RK, num_experts))


@torch.library.custom_op("amfm::limit_pairs_triton", mutates_args=())
def limit_pairs(expert_ids_RK: Tensor, num_experts: int, capacity: int) -> Tensor:
    """The expert ids with those of pairs beyond the first `capacity` of an expert set to `num_experts`; three launches."""
    ids = expert_ids_RK.contiguous()
    kept, size = torch.empty_like(ids), ids.numel()
    if size:
        _, _, places, _, offsets = _sort(ids, num_experts)
        grid = (triton.cdiv(size, LIMIT_BLOCK),)
        limit_pairs_kernel[grid](ids, places, offsets, kept, size, num_experts, capacity, BLOCK=LIMIT_BLOCK)
    return kept


@limit_pairs.register_fake
def _(expert_ids_RK: Tensor, num_experts: int, capacity: int) -> Tensor:
    return torch.empty_like(expert_ids_RK, memory_format=torch.contiguous_format)
