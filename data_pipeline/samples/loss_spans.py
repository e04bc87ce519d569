"""Which tokens of a part are learned, as runs: first and stop of each, one after another, rising.

A label counts where its own token is inside of a run: so the first token that is learned is predicted by the one before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from amfm.data_pipeline.samples.packing import IGNORED_LABEL

Int64 = npt.NDArray[np.int64]


def find_runs(counted: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint64]:
    """Find the runs of true values: uint64 [2 x runs]."""
    edges = np.diff(counted.astype(np.int8), prepend=0, append=0)
    return np.flatnonzero(edges).astype(np.uint64)


def is_counted(spans: Int64, first: int, length: int) -> npt.NDArray[np.bool_]:
    """Whether each of the tokens [first, first + length) is inside of a run."""
    low, high = np.searchsorted(spans, (first, first + length), side="right")
    changes = np.zeros(length + 1, np.int64)
    changes[0] = low
    changes[spans[low:high] - first] += 1
    return np.cumsum(changes)[:length] % 2 == 1


def label_counted(tokens: npt.NDArray[np.generic], pieces: Sequence[npt.NDArray[np.bool_]]) -> Int64:
    """Labels of a row of tokens, of which the first have these values of `is_counted` piece by piece, and the rest counts not."""
    counted = np.zeros(len(tokens), np.bool_)
    known = np.concatenate(pieces)
    counted[: len(known)] = known
    return np.where(counted[1:], tokens[1:].astype(np.int64), IGNORED_LABEL)


def describe_disorder(spans: Int64, num_tokens: int) -> str | None:
    """Why these cannot be runs of a part of so many tokens; None where they can."""
    if not len(spans) or len(spans) % 2:
        return f"{len(spans)} edges do not make runs"
    if spans[0] < 0 or spans[-1] > num_tokens or (np.diff(spans) <= 0).any():
        return "its runs of tokens to learn do not rise within it"
    return None
