"""Multi-token prediction: small modules after the last block that each predict one token further ahead.

    h_0 = final_norm(stream)
    depth k = 1..D, token t:
        stream = in_proj([embed_norm(embed(x_(t+k))); stream_norm(h_(k-1))])
        for block in depth: stream = stream + block.mixer(block.norm(stream))
        h_k = norm(stream);  head(h_k) predicts x_(t+k+1)

Embedding and head are the main model's. The loss makes the main model's states useful for more than the next token, and a
serving engine drafts with the depths. Source: DeepSeek-AI 2024, arXiv 2412.19437, section 2.2.

Documents: x_(t+k) and the label must be in the document of t, else the place has no label; blocks get the layout of the
main ones and reset like them. What a depth reads is shifted on whole rows, before these are cut over context ranks
(`Ahead.of_rows`), so that a place at the end of a rank's segment needs nothing of another rank.

Two-batch overlap: the two halves of a micro-batch alternate through the blocks, so that the rows of one are sent to experts
while the other computes.

Experts that are spread over ranks make a block wait for rows, twice in each direction. Rows of a micro-batch do not know of each
other, so one half can continue while the other waits: each half runs until it would wait and then lets the other run.

    half 1   mixers, router, send | wait, experts, send back |  wait, next mixers, router, send   |
    half 2                        | mixers, router, send     | wait, experts, send back           | wait, next mixers ...

So a half's rows are sent out next to the other's mixers or experts, and back next to its experts or next mixers. Autograd
runs the nodes in reverse creation order, so it alternates in the same way: gradients are sent in parallel with computing
as well.

Every number is that of two micro-batches of half the rows: capacities and balance losses are a half's, and losses are averaged.
The order of all collectives is the same on all ranks, because it follows only from the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from amfm.model.block import Block, Blocks, Stream, pass_through
from amfm.model.build import build_norm
from amfm.model.config.schema import ModelConfig
from amfm.model.loss import IGNORE_INDEX
from amfm.model.mixers.interface import BlockState
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.layers import RowLinear
from amfm.model.parallel.regions import enter_tensor_region, leave_tensor_region

NumberedBlocks = Iterable[tuple[int, Block]]


def pass_rows(
    stream: Stream,
    blocks: Callable[[], NumberedBlocks],
    meta: PackMeta,
    states: Sequence[BlockState] | None = None,
    *,
    training: bool,
) -> Stream:
    """Pass the residual stream through blocks as `pass_through` does, in training half by half if `meta` has halves.

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
            half.add(index, *block(half.residual_BTD, half.delta_BTD, meta.of_block(index)))
            continue
        steps = block.steps(half.residual_BTD, half.delta_BTD, meta.of_block(index))
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


@dataclass(frozen=True)
class Ahead:
    """What one depth reads and learns, [B, T] int64: at t the token x_(t+k), and as label the one after that, or -100."""

    tokens_BT: Tensor
    labels_BT: Tensor

    @classmethod
    def of_rows(cls, tokens_BT: Tensor, labels_BT: Tensor, document_ids_BT: Tensor, depth: int) -> Ahead:
        """Shift whole rows by `depth` tokens; a place whose token ahead is of another document has no label."""
        shifted_BT, labels_ahead_BT = torch.zeros_like(tokens_BT), torch.full_like(labels_BT, IGNORE_INDEX)
        shifted_BT[:, :-depth] = tokens_BT[:, depth:]
        is_same_BT = document_ids_BT[:, depth:] == document_ids_BT[:, :-depth]
        labels_ahead_BT[:, :-depth] = torch.where(is_same_BT, labels_BT[:, depth:], IGNORE_INDEX)
        return cls(shifted_BT, labels_ahead_BT)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Ahead:
        """Apply a function to both tensors: a cut over context ranks, or a move to a device."""
        return Ahead(change(self.tokens_BT), change(self.labels_BT))


class MtpDepth(nn.Module):
    """One depth, or with `model.mtp.shared` all of them: two norms, in_proj [D, 2 D], blocks, and the norm before the head.

    Tensor ranks cut in_proj along its input: each multiplies its part of both norms' outputs. The blocks' indices
    continue after the main model's, so that expert counts and draws are their own. Every rank of the blocks' groups
    must call.
    """

    def __init__(self, number: int, config: ModelConfig, groups: ProcessGroupCollection, backend: str) -> None:
        super().__init__()
        hidden, letters = config.hidden_size, config.parsed_pattern.depth_letters
        self.groups = groups
        self.first_index = len(config.letters) + number * len(letters)
        self.embed_norm = build_norm(config, backend, groups)
        self.stream_norm = build_norm(config, backend, groups)
        self.in_proj = RowLinear(2 * hidden, hidden, groups, name="model.hidden_size", segments=(hidden, hidden))
        self.blocks = Blocks(
            {place: Block(self.first_index + place, config, groups, backend) for place in range(len(letters))}
        )
        self.norm = build_norm(config, backend, groups)

    def forward(self, start: Stream, hidden_BTD: Tensor, meta: PackMeta) -> tuple[Stream, Tensor]:
        """Pass the embedded tokens ahead, as the residual of `start`, and the normed stream before, [B, T, D] both.

        Returns the residual stream after the depth's blocks, with the losses and counts of `start` and theirs, and its norm.
        """
        dtype = self.norm.weight.dtype
        embedded_BTD = self.embed_norm(start.residual_BTD).to(dtype)
        joined_BTX = torch.cat([embedded_BTD, self.stream_norm(hidden_BTD)], dim=-1)
        part_BTD = self.in_proj(self._own_part(enter_tensor_region(joined_BTX, self.groups)))
        first_BTD = leave_tensor_region(part_BTD, self.groups).to(start.residual_BTD.dtype)
        begun = Stream(first_BTD, None, start.auxiliary, start.expert_counts)
        stream = pass_rows(begun, self.numbered_blocks, meta, training=self.training)
        assert stream.delta_BTD is not None, "a depth has at least one block"
        return stream, self.norm.add(stream.delta_BTD, stream.residual_BTD)[0].to(dtype)

    def _own_part(self, joined_BTX: Tensor) -> Tensor:
        """Take this tensor rank's columns of both halves."""
        tp = self.groups.tp
        if tp.size() == 1:
            return joined_BTX
        return torch.cat([half.chunk(tp.size(), dim=-1)[tp.rank()] for half in joined_BTX.chunk(2, dim=-1)], dim=-1)

    def numbered_blocks(self) -> Iterator[tuple[int, Block]]:
        """Iterate over the blocks with their indices among all that are built."""
        for place, block in enumerate(self.blocks):
            yield self.first_index + place, block
