"""One more token of several texts in one pass, each with its own decode state and its own length.

Texts have slots: the decode states of a block are the rows of one state, which stays where it is while the texts continue, so a
token copies no state, and what blocks compute can be recorded and repeated (pretrain/inference/replay.py). A text joins by
copying its state to a row, and leaves by copying it back; one that does not read a token in a pass gets its row back as it was.
A state that grows with its text, as keys and values do, has another length in each, so such a block takes the texts one after
the other; in a hybrid they are few.

What a row gives does not depend on the rows next to it, but for rounding: most libraries add in one order in products of
FEWEST_ROWS rows and more, and there are never fewer slots (MKL on processors without AVX2, and on several threads, may add in
another order for another number of rows).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from amfm.model.block import Block, Stream
from amfm.model.hybrid import HybridModel
from amfm.model.mixers.interface import BlockState, DecodeState
from amfm.model.packing import PackMeta
from amfm.model.state_size import state_tensors
from amfm.pretrain.inference.replay import RecordedBlock, can_repeat, has_fixed_size, read_logits, record

FEWEST_ROWS = 4


class TextRows:
    """Texts by number that a model continues together, in as few slots as they fit. For one thread at a time."""

    def __init__(self, model: HybridModel) -> None:
        self.model = model
        self.of_size: dict[int, Slots] = {}  # that were needed so far, with what is recorded
        self.places: dict[int, tuple[Slots, int]] = {}

    def join(self, text: int, state: DecodeState) -> None:
        """Take in a text: its state is copied."""
        slots = self._slots_for(len(self.places) + 1)
        self.places[text] = slots, slots.join(state)

    def read(self, tokens: Mapping[int, int]) -> dict[int, Tensor]:
        """Read one more token of some texts: logits [V] after it, of each. After an error these texts must leave."""
        slots = self._slots_for(len(self.places))
        logits = slots.read({self.places[text][1]: token for text, token in tokens.items()})
        return {text: logits[self.places[text][1]] for text in tokens}

    def leave(self, text: int) -> DecodeState:
        """Take a text out: its state, in memory of its own."""
        slots, slot = self.places.pop(text)
        return slots.leave(slot)

    def _slots_for(self, number: int) -> Slots:
        """Slots for so many texts, to which those that are here have moved."""
        size = max(FEWEST_ROWS, 1 << (number - 1).bit_length())
        if size not in self.of_size:
            self.of_size[size] = Slots(self.model, size)
        slots = self.of_size[size]
        for text, (before, _) in list(self.places.items()):
            if before is not slots:
                self.places[text] = slots, slots.join(self.leave(text))
        return slots


class Slots:
    """A fixed number of rows of decode states, each of a text or free, that read tokens together."""

    def __init__(self, model: HybridModel, size: int) -> None:
        self.model, self.size = model, size
        self.is_repeatable = can_repeat(model)
        self.free = list(range(size))[::-1]
        self.lengths = [0] * size  # of the text in each slot
        self.states: list[BlockState] = []  # of all slots, by block
        self.grown: dict[int, list[BlockState]] = {}  # of each slot, of the blocks whose state grows
        self.recorded: dict[int, RecordedBlock | None] = {}  # by block, once it has passed a token

    @torch.inference_mode()
    def join(self, state: DecodeState) -> int:
        """Copy a state to a free slot: which one."""
        slot = self.free[-1]
        if not self.states:
            self.states = [tree_map_only(Tensor, self._rows_like, part) for part in state.blocks]
        for index, part in enumerate(state.blocks):
            self._put(index, slot, part)
        self.lengths[slot] = state.length
        return self.free.pop()

    @torch.inference_mode()
    def leave(self, slot: int) -> DecodeState:
        """Free a slot: the state of its text, in memory of its own."""
        parts = [
            self.grown[index][slot] if index in self.grown else take_row(rows, slot)
            for index, rows in enumerate(self.states)
        ]
        for own in self.grown.values():
            own[slot] = None
        self.free.append(slot)
        return DecodeState(tuple(parts), self.lengths[slot])

    @torch.inference_mode()
    def read(self, tokens: Mapping[int, int]) -> dict[int, Tensor]:
        """Read one more token of the texts in some slots: logits [V] after it, of each. After an error these texts must go."""
        device, some = self.model.head_weight().device, next(iter(tokens))
        ids_BT = torch.tensor([tokens.get(slot, tokens[some]) for slot in range(self.size)], device=device)[:, None]
        positions_BT = torch.tensor(self.lengths, dtype=torch.int32, device=device)[:, None]
        meta = PackMeta.one_document_a_row(self.size, 1, start=1, device=device)
        meta = replace(meta, positions_BT=positions_BT).with_tokens(ids_BT)
        stream = self.model.embed(ids_BT)
        held = [slot for slot in range(self.size) if slot not in tokens and slot not in self.free]
        for index, block in enumerate(self.model.blocks):
            if index in self.grown:
                stream = self._pass_one_by_one(index, block, stream, meta, list(tokens))
                continue
            before = {slot: take_row(self.states[index], slot) for slot in held}
            try:
                stream = self._pass_all(index, block, stream, meta)
            finally:
                for slot, part in before.items():
                    self._put(index, slot, part)
        for slot in tokens:
            self.lengths[slot] += 1
        logits_BV = read_logits(self.model, stream)
        return {slot: logits_BV[slot] for slot in tokens}

    def _pass_all(self, index: int, block: Block, stream: Stream, meta: PackMeta) -> Stream:
        """Pass a block with the rows of all slots, by its record if there is one."""
        residual_BTD, delta_BTD, state = stream.residual_BTD, stream.delta_BTD, self.states[index]
        recorded = self.recorded.get(index)
        if recorded is not None:
            return Stream(*recorded.repeat(residual_BTD, delta_BTD))
        if self.is_repeatable and index not in self.recorded:
            recorded, after = record(block, residual_BTD, delta_BTD, meta.of_block(index), state)
            self.recorded[index] = recorded
        else:
            residual_BTD, mixed = block(residual_BTD, delta_BTD, meta.of_block(index), state)
            after = residual_BTD, mixed.y_BTD, mixed.state
        if recorded is not None:
            self.states[index] = recorded.state
        elif [rows.shape for rows in state_tensors(after[2])] == [rows.shape for rows in state_tensors(state)]:
            self.states[index] = after[2]
        else:
            self._take_apart(index, after[2])
        return Stream(*after[:2])

    def _pass_one_by_one(self, index: int, block: Block, stream: Stream, meta: PackMeta, slots: list[int]) -> Stream:
        """Pass a block with the rows of some slots, one after the other; the others get what the first one gives."""
        own, made = self.grown[index], {}
        for slot in slots:
            row = slice(slot, slot + 1)
            delta_BTD = None if stream.delta_BTD is None else stream.delta_BTD[row]
            one = PackMeta.one_document_a_row(1, 1, start=self.lengths[slot], device=meta.positions_BT.device)
            if meta.tokens_BT is not None:
                one = one.with_tokens(meta.tokens_BT[row])
            residual_BTD, mixed = block(stream.residual_BTD[row], delta_BTD, one.of_block(index), own[slot])
            made[slot], own[slot] = (residual_BTD, mixed.y_BTD), mixed.state
        rows = [made.get(slot, made[slots[0]]) for slot in range(self.size)]
        residual_BTD, delta_BTD = (torch.cat(parts) for parts in zip(*rows))
        return Stream(residual_BTD, delta_BTD)

    def _put(self, index: int, slot: int, part: BlockState) -> None:
        """Give a slot the state of a text in one block."""
        if index not in self.grown and not has_fixed_size(self.model.blocks[index], part):
            self._take_apart(index, self.states[index])
        if index in self.grown:
            self.grown[index][slot] = part
            return
        for rows, row in zip(state_tensors(self.states[index]), state_tensors(part), strict=True):
            rows[slot] = row[0]

    def _rows_like(self, row: Tensor) -> Tensor:
        return row.new_zeros(self.size, *row.shape[1:])

    def _take_apart(self, index: int, rows: BlockState) -> None:
        """From now on a block's states are those of each slot: one has grown."""
        self.grown[index] = [None if slot in self.free else take_row(rows, slot) for slot in range(self.size)]


def take_row(state: BlockState, row: int) -> BlockState:
    """The state of one row, in memory of its own."""
    return tree_map_only(Tensor, lambda tensor: tensor[row : row + 1].clone(), state)
