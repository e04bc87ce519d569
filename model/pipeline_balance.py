"""Pieces of a pipeline cut so that the rank that holds most over all of its pieces has least; `parallel.balance: ranks`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

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
