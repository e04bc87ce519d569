"""State tracking: the running product of a sequence of group elements. Parity is the group of two elements.

A uniform element times anything is uniform, so every label is equally likely at every place and no shorter context gives a
hint: a model that is right above chance has tracked the product. Tables are small enough (120 elements at most) to be
computed in Python once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, permutations
from typing import Literal

import numpy as np

from amfm.data_pipeline.synthetic.draws import Draws
from amfm.data_pipeline.synthetic.task import SyntheticRow

GroupName = Literal["parity", "s3", "s4", "a5", "s5"]

Permutation = tuple[int, ...]


@dataclass(frozen=True)
class WordProblem:
    """Word problem of a group: rows of uniformly drawn elements, each labelled with the product of all elements so far.

    For parity one bit of state is enough; the symmetric group of five is complete for NC1, beyond what a recurrence
    with diagonal transitions computes at fixed depth (Merrill, Petty and Sabharwal 2024, arXiv 2404.08819; Siems et al.
    2025, arXiv 2502.10297). Tokens and labels: the elements, numbered as in `group_elements`; 0 is the identity.
    """

    group: GroupName

    @property
    def vocab_size(self) -> int:
        """Number of token ids: the elements of the group."""
        return len(multiplication_table(self.group))

    @property
    def num_classes(self) -> int:
        """Number of different labels: every element."""
        return self.vocab_size

    @property
    def shortest(self) -> int:
        """Fewest tokens of a row: one element."""
        return 1

    def make_row(self, draws: Draws, length: int) -> SyntheticRow:
        """Make a row of `length` elements, with the running products as labels."""
        table = multiplication_table(self.group)
        tokens_T = draws.below(len(table), length)
        products = accumulate(tokens_T.tolist(), lambda left, right: table[left][right])
        return SyntheticRow(tokens_T, np.fromiter(products, np.int64, length))


@lru_cache(maxsize=8)
def group_elements(group: GroupName) -> tuple[Permutation, ...]:
    """List the elements as permutations p, where p[i] is the image of i, in lexical order; parity is S2."""
    size = 2 if group == "parity" else int(group[1:])
    found = permutations(range(size))
    return tuple(p for p in found if group[0] != "a" or is_even(p))


def is_even(permutation: Permutation) -> bool:
    """Tell whether a permutation is even: its number of inversions is."""
    return sum(a > b for place, a in enumerate(permutation) for b in permutation[place + 1 :]) % 2 == 0


@lru_cache(maxsize=8)
def multiplication_table(group: GroupName) -> tuple[tuple[int, ...], ...]:
    """Compute table[p][q], the number of the product p q, which applies q first and then p."""
    elements = group_elements(group)
    numbers = {element: number for number, element in enumerate(elements)}
    return tuple(tuple(numbers[tuple(p[image] for image in q)] for q in elements) for p in elements)
