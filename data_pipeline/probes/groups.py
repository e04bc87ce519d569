"""State tracking: the product so far of a sequence of group elements. Parity is the group of two."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, permutations
from typing import Literal

import numpy as np

from data_pipeline.probes.draws import Draws
from data_pipeline.probes.task import ProbeRow

GroupName = Literal["parity", "s3", "s4", "a5", "s5"]

Permutation = tuple[int, ...]


@dataclass(frozen=True)
class WordProblem:
    """Rows of elements drawn uniformly from a group; at every place the product of all elements so far is asked.

    For parity one bit of state is enough; the symmetric group of five is complete for NC1, beyond what a recurrence
    with diagonal transitions computes at fixed depth (Merrill, Petty and Sabharwal 2024, arXiv 2404.08819; Siems et al.
    2025, arXiv 2502.10297). Tokens: the elements, ordered as `group_elements`; the
    first is the identity, and answers are named by the same tokens.
    """

    group: GroupName

    @property
    def vocab_size(self) -> int:
        """Elements."""
        return len(multiplication_table(self.group))

    @property
    def num_answers(self) -> int:
        """Any element."""
        return self.vocab_size

    @property
    def shortest(self) -> int:
        """One element."""
        return 1

    def make_row(self, draws: Draws, length: int) -> ProbeRow:
        """Elements, and the products so far as labels."""
        table = multiplication_table(self.group)
        tokens_T = draws.below(len(table), length)
        products = accumulate(tokens_T.tolist(), lambda left, right: table[left][right])
        return ProbeRow(tokens_T, np.fromiter(products, np.int64, length))


@lru_cache(maxsize=8)
def group_elements(group: GroupName) -> tuple[Permutation, ...]:
    """The elements as permutations p, with p[i] the image of i, in lexical order; of parity, those of two things."""
    size = 2 if group == "parity" else int(group[1:])
    found = permutations(range(size))
    return tuple(p for p in found if group[0] != "a" or is_even(p))


def is_even(permutation: Permutation) -> bool:
    """Whether it is a product of an even number of exchanges: its pairs out of order are even in number."""
    return sum(a > b for place, a in enumerate(permutation) for b in permutation[place + 1 :]) % 2 == 0


@lru_cache(maxsize=8)
def multiplication_table(group: GroupName) -> tuple[tuple[int, ...], ...]:
    """table[p][q] is the number of the product p q, which applies q first and then p."""
    elements = group_elements(group)
    numbers = {element: number for number, element in enumerate(elements)}
    return tuple(tuple(numbers[tuple(p[image] for image in q)] for q in elements) for p in elements)
