"""When each pipeline rank computes which micro-batch: the schedules of a run, laid out in time for a drawing.

How it works: each rank acts as its schedule's rules say, and an action begins when its rank is free and what it needs
has been computed elsewhere. Forward passes take a third of a pass, backward passes two; zero_bubble cuts those into a part
that other ranks wait for and one that fills gaps. Sends take no time here, and all pieces are equally long.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from amfm.launch.plan.layout import Layout

Kind = Literal["forward", "backward", "weights"]


@dataclass(frozen=True)
class Slot:
    """One action of a rank, in passes of one micro-batch through one rank."""

    rank: int
    piece: int
    kind: Kind
    micro_batch: int
    start: float
    stop: float


@dataclass
class _Rank:
    """What a rank still has to do, in order, as (piece of its own, micro-batch), and when it is free."""

    forward: list[tuple[int, int]]
    backward: list[tuple[int, int]]
    in_flight_limit: int
    is_cut: bool
    weights: list[tuple[int, int]] = field(default_factory=list)
    in_flight: int = 0
    free: float = 0.0


def make_timetable(layout: Layout, num_micro_batches: int) -> list[Slot]:
    """Lay out one step of a pipeline in time, in the order of the starts."""
    ranks, pieces = layout.pipeline, layout.virtual_stages if layout.schedule == "interleaved" else 1
    is_cut = layout.schedule == "zero_bubble"
    lengths: dict[Kind, float] = {"forward": 1 / 3 / pieces, "backward": (1 if is_cut else 2) / 3 / pieces}
    lengths["weights"] = 1 / 3 / pieces
    line = [_begin_rank(rank, ranks, pieces, num_micro_batches, is_cut) for rank in range(ranks)]
    done: dict[tuple[Kind, int, int], float] = {}  # (kind, piece of all, micro-batch) -> when
    slots: list[Slot] = []
    while True:
        choices = [(found, rank) for rank in range(ranks) if (found := _choose(line[rank], rank, ranks, pieces, done))]
        if not choices:
            return slots
        (start, kind, (piece, micro_batch)), rank = min(choices, key=lambda choice: (choice[0][0], choice[1]))
        own, stop = line[rank], start + lengths[kind]
        getattr(own, kind).remove((piece, micro_batch))
        own.free = stop
        own.in_flight += {"forward": 1, "backward": -1, "weights": 0}[kind]
        if kind == "backward" and own.is_cut:
            own.weights.append((piece, micro_batch))
        done[kind, piece * ranks + rank, micro_batch] = stop
        slots.append(Slot(rank, piece, kind, micro_batch, start, stop))


def _begin_rank(rank: int, ranks: int, pieces: int, num_micro_batches: int, is_cut: bool) -> _Rank:
    """A rank before its first action: groups of as many micro-batches as ranks pass one of its pieces after the other."""
    groups = [range(first, min(first + ranks, num_micro_batches)) for first in range(0, num_micro_batches, ranks)]
    forward = [(piece, number) for group in groups for piece in range(pieces) for number in group]
    backward = [(piece, number) for group in groups for piece in reversed(range(pieces)) for number in group]
    limit = ranks - rank if pieces == 1 else 2 * (ranks - rank - 1) + (pieces - 1) * ranks + 1
    return _Rank(forward, backward, limit, is_cut)


def _choose(
    own: _Rank, rank: int, ranks: int, pieces: int, done: dict[tuple[Kind, int, int], float]
) -> tuple[float, Kind, tuple[int, int]] | None:
    """Choose a rank's next action as (start, kind, piece and micro-batch).

    A rank computes forward until as many micro-batches as its limit are in flight, then backward and forward in turns;
    where passes are cut, whatever can start first, backward before forward before weights. None where it is through, or
    where what it waits for has no time yet.
    """
    may_forward = bool(own.forward) and own.in_flight < own.in_flight_limit
    options: list[tuple[float, int, Kind, tuple[int, int]]] = []
    if own.backward and (own.is_cut or not may_forward):
        piece, number = own.backward[0]
        stage = piece * ranks + rank
        is_last = stage == ranks * pieces - 1
        needed = done.get(("forward", stage, number) if is_last else ("backward", stage + 1, number))
        if needed is not None:
            options.append((max(own.free, needed), 0, "backward", own.backward[0]))
    if may_forward:
        piece, number = own.forward[0]
        stage = piece * ranks + rank
        needed = done.get(("forward", stage - 1, number)) if stage else 0.0
        if needed is not None:
            options.append((max(own.free, needed), 1, "forward", own.forward[0]))
    if own.weights:
        options.append((own.free, 2, "weights", own.weights[0]))
    if not options:
        return None
    start, _, kind, action = min(options)
    return start, kind, action
