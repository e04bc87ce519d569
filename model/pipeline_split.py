"""Pieces of a model for a pipeline: runs of consecutive blocks, cut at the pattern's `|` or balanced by FLOPs.

A pipeline is as fast as its slowest stage, and blocks of a hybrid differ in cost several times, so an equal number of blocks
a stage is not balanced. Without `|` the cut minimises the FLOPs of the costliest piece, with the head counted in the last, and
with all MTP layers, which stay with it. With `parallel.balance: ranks` a rank's pieces count together: the rank that holds
most over all of its pieces has least.
FLOPs stand for time: they are known before anything runs, and are the same on every rank, which must agree on the cut.
Whoever measures a better cut writes it into the pattern.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from amfm.model.config.schema import ModelConfig
from amfm.model.flops import block_flops, depth_flops, head_flops


@dataclass(frozen=True)
class Piece:
    """Blocks `start` to `stop` (exclusive) of the pattern; the first piece embeds, the last has final norm, head and MTP layers."""

    start: int
    stop: int
    is_first: bool
    is_last: bool

    @property
    def blocks(self) -> range:
        """Global indices of its blocks."""
        return range(self.start, self.stop)


def whole_piece(config: ModelConfig) -> Piece:
    """Build the one piece of a model that is not cut."""
    return Piece(0, len(config.letters), is_first=True, is_last=True)


@lru_cache(maxsize=256)
def cut_pieces(
    config: ModelConfig, num_pieces: int, sequence_length: int, balance: str = "chunks", num_ranks: int = 1
) -> tuple[Piece, ...]:
    """Cut a model into the pieces of a pipeline: at each `|` of the pattern, else so that the costliest costs least.

    One piece ignores `|`. balance: as `parallel.balance`, which says whether that is a piece, or a rank of `num_ranks` with all of its pieces.
    Raises ValueError if the `|` make another number of pieces, and if there are more pieces than blocks.
    """
    pattern = config.parsed_pattern
    if pattern.piece_cuts and num_pieces > 1:
        if len(pattern.pieces()) != num_pieces:
            raise ValueError(
                f"model.pattern has {len(pattern.piece_cuts)} '|' and so {len(pattern.pieces())} parts, where parallel.pipeline "
                f"x parallel.virtual_stages = {num_pieces} are needed; put {num_pieces - 1} '|', or none to have it balanced"
            )
        edges = (0, *pattern.piece_cuts, len(pattern.letters))
    elif num_pieces > len(pattern.letters):
        raise ValueError(
            f"parallel.pipeline x parallel.virtual_stages = {num_pieces} pieces need a block each, and model.pattern has "
            f"{len(pattern.letters)}; use at most {len(pattern.letters)} pieces"
        )
    else:
        edges = balanced_edges(costs := piece_costs(config, sequence_length), num_pieces)
        if balance == "ranks":
            edges = edges_by_rank(costs, num_ranks, [edges])
    return tuple(
        Piece(start, stop, is_first=start == 0, is_last=stop == len(pattern.letters))
        for start, stop in itertools.pairwise(edges)
    )


def piece_costs(config: ModelConfig, sequence_length: int) -> list[float]:
    """FLOPs per token of each block; the last has those of the head and the MTP layers, the embedding has none."""
    costs = [block_flops(config, symbol, sequence_length) for symbol in config.letters]
    costs[-1] += head_flops(config) + depth_flops(config, sequence_length)
    return costs


def balanced_edges(costs: list[float], num_pieces: int) -> tuple[int, ...]:
    """Cut costs into `num_pieces` non-empty runs such that the largest sum of a run is smallest; returns their edges.

    Of several such cuts it is the one whose squared sums are smallest: no run is longer than it must be. Linear
    partitioning by dynamic programming (Skiena 2008, The Algorithm Design Manual, section 8.5), twice.
    """
    largest, _ = _partition(costs, num_pieces, max)
    _, edges = _partition(costs, num_pieces, lambda run, rest: rest + (run**2 if run <= largest else math.inf))
    return edges


def _partition(
    costs: list[float], num_pieces: int, join: Callable[[float, float], float]
) -> tuple[float, tuple[int, ...]]:
    """Find the best value and its edges; `join` gives the value of a run's sum after that of the runs before it.

    O(pieces x blocks^2) calls of `join`, which is nothing for thousands of blocks.
    """
    sums = [0.0, *itertools.accumulate(costs)]
    # best[n]: value and edges of the first n costs, cut into as many runs as loops were made.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for pieces_left in reversed(range(num_pieces)):
        best = {
            stop: min(
                (join(sums[stop] - sums[start], value), (*edges, stop))
                for start, (value, edges) in best.items()
                if start < stop
            )
            # Every run has a block: as many before `stop` as runs were made, as many after it as are left.
            for stop in range(num_pieces - pieces_left, len(costs) - pieces_left + 1)
        }
    return best[len(costs)]


def pieces_of_rank(pieces: tuple[Piece, ...], rank: int, num_ranks: int) -> tuple[Piece, ...]:
    """Pieces that one pipeline rank holds: with several a rank, every `num_ranks`-th (Narayanan et al. 2021, section 2.2)."""
    return pieces[rank::num_ranks]


NEAR = 3  # cuts apart at most, of two that move together


def edges_by_rank(costs: Sequence[float], num_ranks: int, starts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Edges of pieces such that the rank with the largest sum of its pieces' costs has little.

    From those of each start, edges move by a block, one or two neighbours at a time, while the largest sum falls.
    """
    return min(
        (_moved(costs, edges, num_ranks) for edges in starts), key=lambda edges: sums_of_ranks(costs, edges, num_ranks)
    )


def sums_of_ranks(costs: Sequence[float], edges: Sequence[int], num_ranks: int) -> tuple[float, float]:
    """The largest rank's sum of costs, and the sum of all ranks' squares, by which equal cuts are compared."""
    sums = [0.0] * num_ranks
    for index, (start, stop) in enumerate(itertools.pairwise(edges)):
        sums[index % num_ranks] += sum(costs[start:stop])
    return max(sums), sum(each * each for each in sums)


def _moved(costs: Sequence[float], edges: Sequence[int], num_ranks: int) -> tuple[int, ...]:
    """Edges from which no step of one or two of them by a block makes the largest rank smaller."""
    best, value = tuple(edges), sums_of_ranks(costs, edges, num_ranks)
    inner = range(1, len(edges) - 1)
    pairs = (pair for pair in itertools.combinations(inner, 2) if pair[1] - pair[0] <= NEAR)
    together: list[tuple[int, ...]] = [*((place,) for place in inner), *pairs]
    moves = [(places, steps) for places in together for steps in itertools.product((-1, 1), repeat=len(places))]
    is_moving = True
    while is_moving:
        is_moving = False
        for places, steps in moves:
            moved = list(best)
            for place, step in zip(places, steps):
                moved[place] += step
            if all(start < stop for start, stop in itertools.pairwise(moved)):
                other = sums_of_ranks(costs, moved, num_ranks)
                if other < value:
                    best, value, is_moving = tuple(moved), other, True
    return best
