"""Multi-token prediction: small modules behind the last block that each predict one token further ahead.

    h_0 = final_norm(stream)
    depth k = 1..D, token t:
        stream = in_proj([embed_norm(embed(x_(t+k))); stream_norm(h_(k-1))])
        for block in depth: stream = stream + block.mixer(block.norm(stream))
        h_k = norm(stream);  head(h_k) predicts x_(t+k+1)

Embedding and head are the main model's. The loss makes the main model's states useful for more than the next token, and a
serving engine drafts with the depths. Source: DeepSeek-AI 2024, arXiv 2412.19437, section 2.2.

Documents: x_(t+k) and the label must lie in the document of t, else the place has no label; blocks get the layout of the
main ones and reset like them. What a depth reads is shifted on whole rows, before these are cut over context ranks
(`Ahead.of_rows`), so that a place at the end of a rank's segment needs nothing of another rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from amfm.model.block import Block, Blocks, Stream
from amfm.model.config.schema import ModelConfig
from amfm.model.loss import IGNORE_INDEX
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.layers import RMSNorm, RowLinear
from amfm.model.parallel.regions import enter_tensor_region, leave_tensor_region
from amfm.model.turns import pass_rows


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
    continue behind the main model's, so that expert counts and draws are their own. Every rank of the blocks' groups
    must call.
    """

    def __init__(self, number: int, config: ModelConfig, groups: ProcessGroupCollection, backend: str) -> None:
        super().__init__()
        hidden, letters = config.hidden_size, config.parsed_pattern.depth_letters
        self.groups = groups
        self.first_index = len(config.letters) + number * len(letters)
        self.embed_norm = RMSNorm(hidden, config.norm_epsilon, backend, groups)
        self.stream_norm = RMSNorm(hidden, config.norm_epsilon, backend, groups)
        self.in_proj = RowLinear(2 * hidden, hidden, groups, name="model.hidden_size", segments=(hidden, hidden))
        self.blocks = Blocks(
            {place: Block(self.first_index + place, config, groups, backend) for place in range(len(letters))}
        )
        self.norm = RMSNorm(hidden, config.norm_epsilon, backend, groups)

    def forward(self, start: Stream, hidden_BTD: Tensor, meta: PackMeta) -> tuple[Stream, Tensor]:
        """Pass the embedded tokens ahead, as the residual of `start`, and the normed stream before, [B, T, D] both.

        Returns the stream after the depth's blocks, with the losses and counts of `start` and theirs, and its norm.
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
