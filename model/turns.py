"""Two halves of a micro-batch's rows pass the blocks in turns: the rows of one travel to experts next to what the other
computes.

Experts that are spread over ranks make a block wait for rows, twice in each direction. Rows of a micro-batch do not know of each
other, so one half can continue while the other waits: each half runs until it would wait and then lets the other run.

    half 1   mixers, router, send | wait, experts, send home |  wait, next mixers, router, send   |
    half 2                        | mixers, router, send     | wait, experts, send home           | wait, next mixers ...

So a half's rows travel out next to the other's mixers or experts, and home next to its experts or next mixers. Autograd
runs the nodes that were made last first, which is the same turns backwards: gradients travel in parallel with computing
as well.

Every number is that of two micro-batches of half the rows: capacities and balance losses are a half's, and losses are averaged.
The order of all collectives is the same on all ranks, because it follows from the blocks alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from amfm.model.block import Block, Stream, pass_through
from amfm.model.mixers.interface import BlockState
from amfm.model.packing import PackMeta

NumberedBlocks = Iterable[tuple[int, Block]]


def pass_rows(
    stream: Stream,
    blocks: Callable[[], NumberedBlocks],
    meta: PackMeta,
    states: Sequence[BlockState] | None = None,
    *,
    training: bool,
) -> Stream:
    """Pass the stream through blocks as `pass_through` does, in training in turns where `meta` has halves.

    `blocks`: gives them from the first one, at each call.
    """
    if not (training and meta.halves):
        return pass_through(stream, blocks(), meta, states)
    assert states is None, "decode states have no halves"
    residuals = stream.residual_BTD.split(len(stream.residual_BTD) // 2)
    deltas = (None, None) if stream.delta_BTD is None else stream.delta_BTD.split(len(stream.delta_BTD) // 2)
    halves = [Stream(residual_BTD, delta_BTD) for residual_BTD, delta_BTD in zip(residuals, deltas, strict=True)]
    runs: list[Iterator[None]] = [_run(half, blocks(), own) for half, own in zip(halves, meta.halves, strict=True)]
    while runs:
        runs = [run for run in runs if next(run, runs) is None]
    return _join(stream, *halves)


def _run(half: Stream, blocks: NumberedBlocks, meta: PackMeta) -> Iterator[None]:
    """Pass one half through blocks, and let the other run where rows have set out."""
    for index, block in blocks:
        if not block.mixer.travels:
            half.add(index, *block(half.residual_BTD, half.delta_BTD, meta))
            continue
        steps = block.steps(half.residual_BTD, half.delta_BTD, meta)
        while (done := block.advance(steps)) is None:
            yield
        half.add(index, *done)


def _join(before: Stream, first: Stream, second: Stream) -> Stream:
    """The whole rows again, with what was given before; losses are means of both halves, counts their sums."""
    assert first.delta_BTD is not None and second.delta_BTD is not None, "a piece has at least one block"
    joined = Stream(
        torch.cat([first.residual_BTD, second.residual_BTD]),
        torch.cat([first.delta_BTD, second.delta_BTD]),
        dict(before.auxiliary),
        dict(before.expert_counts),
    )
    for index, counts_E in first.expert_counts.items():
        joined.add_counts(index, counts_E + second.expert_counts[index])
    joined.add_auxiliary({name: (value + second.auxiliary[name]) / 2 for name, value in first.auxiliary.items()})
    return joined
