"""The synthetic tasks: associative recall, copying, and state tracking, of random numbers that are a function of a row's key.

The numbers of a row are equal on every machine and under every release of numpy, and any row can be made without those before
it.

Associative recall has keys with values, then only keys, to be completed by their values. It asks for what attention does
exactly and a recurrence must fit into its state, so accuracy against the number of pairs measures the capacity of a mixer's
state.

State tracking is the running product of a sequence of group elements. Parity is the group of two elements. A uniform element
times anything is uniform, so every label is equally likely at every place and no shorter context gives a hint: a model that is
right above chance has tracked the product. Tables are small enough (120 elements at most) to be computed in Python once.

All tasks share one flat section, so that a benchmark can vary the task by one key. A setting that the chosen task does not
read is rejected, because a run with it would look like another experiment than it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, permutations
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from amfm.data_pipeline.samples.packing import IGNORED_LABEL

if TYPE_CHECKING:
    # pydantic takes longer to import than reading processes start.
    from amfm.data_pipeline.config import SyntheticConfig


Int64 = npt.NDArray[np.int64]


class Draws:
    """Stream of random numbers from a key of at least 16 bytes, of which the first 16 are used.

    Built on the raw words of Philox (Salmon et al. 2011): numpy guarantees the words of a bit generator for ever, but
    may change what its distributions derive from them (NEP 19).
    """

    def __init__(self, key: bytes) -> None:
        self._bits = np.random.Philox(key=int.from_bytes(key[:16], "little"))

    def below(self, bound: int, count: int) -> Int64:
        """Draw `count` independent integers in [0, bound); the bias of a value is at most bound / 2^63."""
        return (self._words(count) >> np.uint64(1)).astype(np.int64) % bound

    def choose(self, bound: int, count: int) -> Int64:
        """Draw `count` different integers in [0, bound), in random order."""
        assert count <= bound, f"{count} different numbers of {bound}"
        return np.argsort(self._words(bound), kind="stable")[:count]

    def shuffle(self, values: Int64) -> Int64:
        """Return the values in random order."""
        return values[self.choose(len(values), len(values))]

    def _words(self, count: int) -> npt.NDArray[np.uint64]:
        words: npt.NDArray[np.uint64] = self._bits.random_raw(count)
        return words


NOISE = 0  # the token of places that hold nothing


class SyntheticRow(NamedTuple):
    """One row: tokens_T [T] int64, the input; labels_T [T] int64, the right prediction at each judged place, else -100."""

    tokens_T: Int64
    labels_T: Int64


class SyntheticTask(Protocol):
    """A task with its settings: a frozen dataclass, whose repr is part of the data's identity. Equal tasks give equal rows."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids; tokens and labels are below it."""

    @property
    def num_classes(self) -> int:
        """Number of different labels, all equally frequent: predicting always the same one has accuracy 1 / num_classes."""

    @property
    def shortest(self) -> int:
        """Fewest tokens that a row can have."""

    def make_row(self, draws: Draws, length: int) -> SyntheticRow:
        """Make a row of `length` tokens, a function of only the draws."""


def empty_row(length: int) -> SyntheticRow:
    """Make a row of noise without labels, to be filled in."""
    return SyntheticRow(np.full(length, NOISE, np.int64), np.full(length, IGNORED_LABEL, np.int64))


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


COPY = NOISE + 1  # the token that stands where a copied token is to be predicted


@dataclass(frozen=True)
class SelectiveCopying:
    """`num_copied` tokens at random places among noise, then as many copy marks, each labelled with the next of them.

    The distances vary from row to row, so a mixer must select by content what it keeps; a time-invariant one cannot (Gu
    and Dao 2023, arXiv 2312.00752, section 3.1). Tokens: noise, the copy mark, `num_symbols` tokens to copy.
    """

    num_copied: int
    num_symbols: int

    @property
    def vocab_size(self) -> int:
        """Number of token ids: noise, copy mark and symbols."""
        return COPY + 1 + self.num_symbols

    @property
    def num_classes(self) -> int:
        """Number of different labels: every symbol."""
        return self.num_symbols

    @property
    def shortest(self) -> int:
        """Fewest tokens of a row: the symbols to copy and a mark for each."""
        return 2 * self.num_copied

    def make_row(self, draws: Draws, length: int) -> SyntheticRow:
        """Make a row of `length` tokens: symbols among noise, then the copy marks."""
        tokens_T, labels_T = row = empty_row(length)
        end = length - self.num_copied
        symbols = COPY + 1 + draws.below(self.num_symbols, self.num_copied)
        # Sorted places, so that the order of the symbols in the row is the order to repeat them in.
        tokens_T[np.sort(draws.choose(end, self.num_copied))] = symbols
        tokens_T[end:], labels_T[end:] = COPY, symbols
        return row


@dataclass(frozen=True)
class AssociativeRecall:
    """Multi-query associative recall, with each key written once or several times.

    A row writes `num_pairs` different keys `num_writes` times each, in random order and with a fresh value each time,
    and then queries each key once for the value written last.

    One write is the task of Arora et al. 2023 (arXiv 2312.04927, section 3); with several, a state must forget what is
    overwritten. A write is two tokens, key and value; a query is the key's token, labelled with the value. Queries stand
    at places drawn uniformly from the rest of the row, which is noise otherwise (the paper draws the distance from a
    power law). Tokens: noise, keys, values. Raises ValueError for more pairs than keys.
    """

    num_pairs: int
    num_writes: int
    num_keys: int
    num_values: int

    def __post_init__(self) -> None:
        if self.num_pairs > self.num_keys:
            raise ValueError(
                f"num_pairs={self.num_pairs} must be at most num_keys={self.num_keys}: the keys of a sequence differ; "
                "lower it, or raise num_keys"
            )

    @property
    def vocab_size(self) -> int:
        """Number of token ids: noise, keys and values."""
        return 1 + self.num_keys + self.num_values

    @property
    def num_classes(self) -> int:
        """Number of different labels: every value."""
        return self.num_values

    @property
    def shortest(self) -> int:
        """Fewest tokens of a row: two a write, one per query."""
        return self.num_pairs * (2 * self.num_writes + 1)

    def make_row(self, draws: Draws, length: int) -> SyntheticRow:
        """Make a row of `length` tokens: the writes, then the queries among noise."""
        tokens_T, labels_T = row = empty_row(length)
        keys = NOISE + 1 + draws.choose(self.num_keys, self.num_pairs)
        written = draws.shuffle(np.tile(np.arange(self.num_pairs), self.num_writes))
        values = NOISE + 1 + self.num_keys + draws.below(self.num_values, len(written))
        begin = 2 * len(written)
        tokens_T[0:begin:2], tokens_T[1:begin:2] = keys[written], values
        # A later write of a key replaces an earlier one.
        last_values = dict(zip(written.tolist(), values.tolist()))
        places = begin + draws.choose(length - begin, self.num_pairs)
        tokens_T[places], labels_T[places] = keys, [last_values[number] for number in range(self.num_pairs)]
        return row


# Which settings of `data.synthetic` each task reads, next to its name.
SETTINGS: dict[str, tuple[str, ...]] = {
    "mqar": ("num_pairs", "num_keys", "num_values"),
    "overwriting": ("num_pairs", "num_writes", "num_keys", "num_values"),
    "selective_copying": ("num_copied", "num_symbols"),
    "parity": (),
    "s3": (),
    "s4": (),
    "a5": (),
    "s5": (),
}


def build_task(config: SyntheticConfig) -> SyntheticTask:
    """Build the task of a configuration.

    Raises ValueError for settings that do not fit together, and for one that is set but not read by the task.
    """
    unread = [
        name
        for name, field in type(config).model_fields.items()
        if name not in ("task", *SETTINGS[config.task]) and getattr(config, name) != field.default
    ]
    if unread:
        known = ", ".join(SETTINGS[config.task]) or "none"
        raise ValueError(
            f"{unread[0]}={getattr(config, unread[0])} has no effect on the synthetic task {config.task}, whose settings are: "
            f"{known}; remove it"
        )
    if config.task == "mqar":
        return AssociativeRecall(config.num_pairs, 1, config.num_keys, config.num_values)
    if config.task == "overwriting":
        return AssociativeRecall(config.num_pairs, config.num_writes, config.num_keys, config.num_values)
    if config.task == "selective_copying":
        return SelectiveCopying(config.num_copied, config.num_symbols)
    return WordProblem(config.task)
