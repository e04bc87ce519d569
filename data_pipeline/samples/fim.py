"""Fill in the middle: a row's documents are cut in three and the middle comes last, so that a model learns to write between.

Bavarian et al. 2022, arXiv 2207.14255. What is cut is what a row holds of a document (their context level), at tokens. A piece
keeps its length, so that rows, document ends and the order of samples are what they were: of its end as many tokens are
left out as are added. They would be the last of the suffix, after which nothing is learned. Which pieces are cut, and where, is a
function of the seed, the source and the sample's number; so it resumes, and differs from epoch to epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from amfm.data_pipeline.samples.packing import Row
from amfm.data_pipeline.store.store import TokenStore
from amfm.data_pipeline.tokenizer.tokenizer import load_tokenizer, require_marking

ADDED = 4  # three tokens around the pieces and the end token, which the piece may have already
SMALLEST = 2 * ADDED  # shorter pieces stay as they are: most of one would be tokens of the form


@dataclass(frozen=True)
class FimSettings:
    """How rows of a source are cut; tokens: those before prefix, suffix and middle, by text."""

    rate: float
    kind: Literal["psm", "spm"]
    tokens: tuple[str, str, str]

    def open(self, store: TokenStore, source: str) -> Callable[[Row, bytes], Row]:
        """What cuts rows of a source of a store, each by its key. Raises ValueError for tokens that its tokenizer does not have."""
        ids = find_ids(store, source, self)
        return lambda row, key: fill_in_middle(row, self, ids, store.eos_id, key)


def fill_in_middle(row: Row, settings: FimSettings, ids: tuple[int, int, int], end_id: int, key: bytes) -> Row:
    """Cut some pieces of a row, whose labels are the tokens that follow. ids: of `settings.tokens`. key: of the sample."""
    assert row.labels is None, "sequences that have their own labels are not cut"
    tokens = row.tokens.copy()
    bounds = [start for start in row.starts.tolist() if start < row.num_valid]
    for number, (start, stop) in enumerate(pairwise([*bounds, row.num_valid])):
        drawn = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=24, key=key).digest()
        chance, first, second = (int.from_bytes(drawn[place : place + 8], "little") for place in (0, 8, 16))
        if stop - start < SMALLEST or chance >= settings.rate * 2**64:
            continue
        kept = tokens[start : stop - ADDED].copy()  # without the end token that a whole document has
        low, high = sorted((first % (len(kept) + 1), second % (len(kept) + 1)))
        tokens[start:stop] = _arrange(kept, low, high, settings.kind, ids, end_id)
    return row._replace(tokens=tokens)


def _arrange(
    kept: npt.NDArray[np.generic], low: int, high: int, kind: str, ids: tuple[int, int, int], end_id: int
) -> npt.NDArray[np.generic]:
    """A piece of which the tokens [low, high) are the middle, with the end token behind it."""
    before, behind, between = (np.array([index], kept.dtype) for index in ids)
    end = np.array([end_id], kept.dtype)
    prefix, middle, suffix = np.split(kept, [low, high])
    if kind == "psm":
        return np.concatenate((before, prefix, behind, suffix, between, middle, end))
    return np.concatenate((before, behind, suffix, between, prefix, middle, end))


def find_ids(store: TokenStore, source: str, fim: FimSettings) -> tuple[int, int, int]:
    """Ids of the tokens of a source's `fim`. Raises ValueError for one that the tokenizer does not have."""
    tokenizer = require_marking(load_tokenizer(store.location), f"fim of source {source!r}")
    ids = [tokenizer.find_token(text) for text in fim.tokens]
    for text, index in zip(fim.tokens, ids):
        if index is None:
            raise ValueError(
                f"fim of source {source!r}: the store's tokenizer has no token {text!r}; name tokens that it has in "
                "data.sources.*.fim.tokens, or train it with data.tokenizer.control_tokens"
            )
    first, second, third = (index for index in ids if index is not None)
    return first, second, third
