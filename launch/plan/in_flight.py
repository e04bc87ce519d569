"""What a rank of a pipeline holds at each of its passes: how many micro-batches of each of its pieces are under way.

How it works: a rank's order of passes follows only from its schedule. It begins with some forward passes, then goes forward
and backward in turns, in groups of as many micro-batches as there are stages (Narayanan et al. 2021, arXiv 2104.04473,
section 2.2). A piece's micro-batch is held from its forward to its backward pass. Under zero-bubble, whose backward passes are
cut in two, what its weights' gradients are made of stays until those are computed, which a later stage puts off by as many
passes as it begins fewer.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate
from operator import ge
from typing import NamedTuple

from amfm.launch.plan.layout import Layout, StageShare

ROUNDS = 3  # of as many micro-batches as stages: passes repeat after the first


class Moment(NamedTuple):
    """A pass of one piece, and the micro-batches held of each piece, this one included.

    `cut`: micro-batches whose backward pass is over, and has left the gradients of the weights for later. `passed`: whether
    a micro-batch of this step has passed the piece backward before, so that its gradients exist.
    """

    piece: int
    is_forward: bool
    held: tuple[int, ...]
    cut: tuple[int, ...]
    passed: tuple[bool, ...]


def places_of(held: StageShare) -> tuple[tuple[int, ...], ...]:
    """Indices of the main blocks of each piece of a rank."""
    stops = accumulate(len(piece) for piece in held.pieces)
    return tuple(held.indices[stop - len(piece) : stop] for stop, piece in zip(stops, held.pieces))


def moments_of(layout: Layout, stage: int, micro_batches: int) -> tuple[Moment, ...]:
    """The passes of a rank of a pipeline stage at which it holds the most; another of the same piece holds no more of any."""
    ranks = layout.pipeline
    return _moments(layout.schedule, ranks, layout.virtual_stages, stage, min(micro_batches, ROUNDS * ranks))


@lru_cache(maxsize=4096)
def _moments(schedule: str, ranks: int, pieces: int, stage: int, micro_batches: int) -> tuple[Moment, ...]:
    total = micro_batches * pieces
    first = min(total, (pieces - 1) * ranks + (2 if schedule == "interleaved" else 1) * (ranks - 1 - stage))
    delay = stage if schedule == "zero_bubble" else 0
    held, cut, passed = [0] * pieces, [0] * pieces, [False] * pieces
    waiting: list[int] = []
    found: set[Moment] = set()
    for step in range(total + first):
        if step < total:
            piece = step // ranks % pieces
            held[piece] += 1
            found.add(Moment(piece, True, tuple(held), tuple(cut), tuple(passed)))
        if step >= first:
            piece = pieces - 1 - (step - first) // ranks % pieces
            found.add(Moment(piece, False, tuple(held), tuple(cut), tuple(passed)))
            held[piece], passed[piece] = held[piece] - 1, True
            waiting.append(piece)
            cut[piece] += 1
            if step - first >= delay:
                cut[waiting.pop(0)] -= 1
    return _fullest(found)


def _fullest(moments: Iterable[Moment]) -> tuple[Moment, ...]:
    """The moments than which no other of the same pass holds as much of everything, and more of something."""
    fullest: dict[tuple[int, bool], list[tuple[int, ...]]] = {}
    found = []
    held = {one: one.held + one.cut + one.passed for one in moments}
    # What holds more comes first, so a moment needs to be compared with only those that stay.
    for one, numbers in sorted(held.items(), key=lambda entry: -sum(entry[1])):
        others = fullest.setdefault(one[:2], [])
        if not any(all(map(ge, other, numbers)) for other in others):
            others.append(numbers)
            found.append(one)
    return tuple(found)
