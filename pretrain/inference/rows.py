"""One more token of several texts in one pass, each with its own decode state and its own length.

States of fixed size (recurrences, windows of convolutions) and blocks without one take all texts as rows. A state that grows with
its text, as keys and values do, has another length in each, so such a block takes them one after the other; in a hybrid they are
few. What a row gives does not depend on the rows next to it, but for rounding: most libraries add in one order in products of
FEWEST_ROWS rows and more, and fewer rows are filled up to that many (MKL on processors without AVX2, and on several threads,
may add in another order for another number of rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from amfm.model.block import Block, Stream
from amfm.model.hybrid import HybridModel
from amfm.model.mixers.interface import BlockState, DecodeState
from amfm.model.packing import PackMeta
from amfm.model.state_size import state_tensors

FEWEST_ROWS = 4


@torch.inference_mode()
def advance(model: HybridModel, state: DecodeState, ids: Sequence[int]) -> tuple[DecodeState, Tensor]:
    """Read more tokens of one text: its new state, and the logits [V] after the last token, on the CPU in float32."""
    device = model.head_weight().device
    meta = PackMeta.one_document_a_row(1, len(ids), start=state.length, device=device)
    tokens_BT = torch.tensor([list(ids)], device=device)
    stream = model.pass_blocks(model.embed(tokens_BT), model.blocks.indices(), meta.with_tokens(tokens_BT), state)
    assert stream.delta_BTD is not None, "a model has blocks"
    last = Stream(stream.residual_BTD[:, -1:], stream.delta_BTD[:, -1:])
    return DecodeState(tuple(stream.states), state.length + len(ids)), read_logits(model, last)[0]


@torch.inference_mode()
def advance_rows(
    model: HybridModel, states: Sequence[DecodeState], tokens: Sequence[int]
) -> list[tuple[DecodeState, Tensor]]:
    """Read one more token of each text: new states, and the logits [V] after it, on the CPU in float32."""
    missing, device = max(0, FEWEST_ROWS - len(states)), model.head_weight().device
    filled, ids = [*states, *[states[-1]] * missing], [*tokens, *[tokens[-1]] * missing]
    metas = [PackMeta.one_document_a_row(1, 1, start=state.length, device=device) for state in filled]
    meta = replace(
        metas[0],
        document_ids_BT=torch.cat([each.document_ids_BT for each in metas]),
        positions_BT=torch.cat([each.positions_BT for each in metas]),
    )
    tokens_BT = torch.tensor(ids, device=device)[:, None]
    meta, stream, after = meta.with_tokens(tokens_BT), model.embed(tokens_BT), []
    for index, block in enumerate(model.blocks):
        parts = [state.blocks[index] for state in filled]
        if has_fixed_size(block, parts):
            residual_BTD, mixed = block(stream.residual_BTD, stream.delta_BTD, meta, join(parts))
            stream = Stream(residual_BTD, mixed.y_BTD)
            after.append([take_row(mixed.state, row) for row in range(len(states))])
        else:
            stream, made = pass_one_by_one(block, stream, metas, parts, len(states))
            after.append(made)
    logits_BV = read_logits(model, stream)
    return [
        (DecodeState(tuple(made[row] for made in after), state.length + 1), logits_BV[row])
        for row, state in enumerate(states)
    ]


def read_logits(model: HybridModel, stream: Stream) -> Tensor:
    """Logits [B, V] of a stream of one token a row, on the CPU in float32."""
    logits_BTV = model.finish(stream, None).logits_BTV
    assert logits_BTV is not None, "no labels were given"
    return logits_BTV[:, 0].float().cpu()


def has_fixed_size(block: Block, parts: Sequence[BlockState]) -> bool:
    """Whether the states of a block are as large as one before the first token, so that they are rows of one."""
    empty = [tensor.shape for tensor in state_tensors(block.mixer.empty_state(1))]
    return all([tensor.shape for tensor in state_tensors(part)] == empty for part in parts)


def join(parts: Sequence[BlockState]) -> BlockState:
    """States of rows as one state of all of them."""
    return tree_map(lambda *rows: None if rows[0] is None else torch.cat(rows), *parts)


def take_row(state: BlockState, row: int) -> BlockState:
    """The state of one row, in memory of its own."""
    return tree_map_only(Tensor, lambda tensor: tensor[row : row + 1].clone(), state)


def pass_one_by_one(
    block: Block, stream: Stream, metas: Sequence[PackMeta], parts: Sequence[BlockState], num_rows: int
) -> tuple[Stream, list[BlockState]]:
    """Pass the first rows one after the other; those after them are copies of the last one, and get what it gives."""
    given = []
    for row in range(num_rows):
        delta_BTD = None if stream.delta_BTD is None else stream.delta_BTD[row : row + 1]
        given.append(block(stream.residual_BTD[row : row + 1], delta_BTD, metas[row], parts[row]))
    given += [given[-1]] * (len(parts) - num_rows)
    residual_BTD, delta_BTD = (torch.cat(rows) for rows in zip(*((each, mixed.y_BTD) for each, mixed in given)))
    return Stream(residual_BTD, delta_BTD), [mixed.state for _, mixed in given[:num_rows]]
