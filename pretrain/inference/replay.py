"""A text that a model reads on, token by token without the model's Python: what blocks compute is recorded, then repeated.

A token of a small model costs a processor some thousand calls of Python that decide the same each time: which branch, which
shapes, which memory. So the first token after the prompt records the operations of each block, PyTorch's and those in C
(`amfm.kernels.runtime.native`), with the memory that they read and write. Later tokens repeat them there, as a GPU repeats a
graph: the same operations on the same shapes, whose results are bitwise identical.

A block is recorded if that cannot go wrong: its state keeps its size, each operation reads only weights, the residual
stream, the state or what it made itself, draws nothing, gives no number to Python, and can write over its result. Attention,
whose keys grow, and every other block run as always.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from amfm.kernels.runtime.native import NativeCall, note_native_calls
from amfm.model.block import Block, Stream, use_at_once
from amfm.model.hybrid import HybridModel
from amfm.model.mixers.interface import BlockState, DecodeState
from amfm.model.packing import PackMeta
from amfm.model.state_size import state_tensors

Repeat = Callable[[], object]
_UNFILLED = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
_ZEROS = ("zeros", "new_zeros", "zeros_like")
_FILLED = ("new_full", "full_like", "new_ones", "ones_like")


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


def read_logits(model: HybridModel, stream: Stream) -> Tensor:
    """Logits [B, V] of a stream of one token a row, on the CPU in float32."""
    logits_BTV = model.finish(stream, None).logits_BTV
    assert logits_BTV is not None, "no labels were given"
    return logits_BTV[:, 0].float().cpu()


class OneText:
    """A text that a model reads on: a prompt of any length, then tokens one by one. For one thread at a time."""

    def __init__(self, model: HybridModel) -> None:
        self.model, self.state, self.is_repeatable = model, model.empty_state(1), can_repeat(model)
        self.recorded: dict[int, RecordedBlock | None] = {}  # by block, once it has passed a token

    def read(self, ids: Sequence[int]) -> Tensor:
        """Read more tokens; logits [V] after the last one, float32 on the CPU."""
        if self.state.length > 0 and len(ids) == 1 and self.is_repeatable:
            return self._read_token(ids[0])
        assert not self.recorded, "tokens follow one by one once a text is recorded"
        self.state, logits_V = advance(self.model, self.state, ids)
        return logits_V

    @torch.inference_mode()
    def _read_token(self, token: int) -> Tensor:
        """Read one token, by the records of blocks that have one; such a block's state is in its record."""
        tokens_BT = torch.tensor([[token]])
        meta = PackMeta.one_document_a_row(1, 1, start=self.state.length).with_tokens(tokens_BT)
        stream, states = self.model.embed(tokens_BT), list(self.state.blocks)
        for index, block in enumerate(self.model.blocks):
            residual_BTD, delta_BTD, own = stream.residual_BTD, stream.delta_BTD, meta.of_block(index)
            recorded = self.recorded.get(index)
            if recorded is not None:
                stream = Stream(*recorded.repeat(residual_BTD, delta_BTD))
                continue
            if index not in self.recorded and has_fixed_size(block, states[index]):
                self.recorded[index], after = record(block, residual_BTD, delta_BTD, own, states[index])
                stream, states[index] = Stream(*after[:2]), after[2]
            else:
                residual_BTD, mixed = block(residual_BTD, delta_BTD, own, states[index])
                stream, states[index] = Stream(residual_BTD, mixed.y_BTD), mixed.state
                self.recorded[index] = None
        self.state = DecodeState(tuple(states), self.state.length + 1)
        return read_logits(self.model, stream)[0]


def has_fixed_size(block: Block, part: BlockState) -> bool:
    """Whether the state of one text is as large as one before the first token, so that all tokens have its shapes."""
    empty = [tensor.shape for tensor in state_tensors(block.mixer.empty_state(1))]
    return [tensor.shape for tensor in state_tensors(part)] == empty


def can_repeat(model: HybridModel) -> bool:
    """Whether tokens of a model may be recorded: all of it is here, on a CPU, and no one is called inside of it."""
    if model.embedding is None or model.final_norm is None or model.before_use is not use_at_once or model.training:
        return False
    has_hooks = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    is_alone = model.groups.tp.size() == model.groups.ep.size() == 1
    return is_alone and not has_hooks and model.embedding.weight.device.type == "cpu"


class RecordedBlock:
    """What a block computes for one token of each row, in memory that it keeps; `state`: of the rows, as they continue."""

    def __init__(
        self,
        given: tuple[Tensor, Tensor | None],
        left: tuple[Tensor, Tensor],
        state: BlockState,
        repeats: list[Repeat],
        kept: object,
    ) -> None:
        self.given, self.left, self.state, self.repeats, self.kept = given, left, state, repeats, kept

    def repeat(self, residual_BTD: Tensor, delta_BTD: Tensor | None) -> tuple[Tensor, Tensor]:
        """Residual and delta after the block for the next token; its state is kept here."""
        for place, value in zip(self.given, (residual_BTD, delta_BTD)):
            if place is not None and value is not None and value is not place:
                place.copy_(value)
        for each in self.repeats:
            each()
        return self.left


Passed = tuple[Tensor, Tensor, BlockState]


def record(
    block: Block, residual_BTD: Tensor, delta_BTD: Tensor | None, meta: PackMeta, state: BlockState
) -> tuple[RecordedBlock | None, Passed]:
    """Pass a block and record it, None if it cannot be: also residual, delta and state after it."""
    if not all(leaf is None or isinstance(leaf, Tensor) for leaf in tree_leaves(state)):
        residual_BTD, mixed = block(residual_BTD, delta_BTD, meta, state)
        return None, (residual_BTD, mixed.y_BTD, mixed.state)
    own_state = tree_map_only(Tensor, Tensor.clone, state)
    own = [leaf for leaf in tree_leaves(own_state) if leaf is not None]
    tensors = [residual_BTD, *([] if delta_BTD is None else [delta_BTD]), *own]
    recorder = Recorder([*block.parameters(), *block.buffers(), *tensors])
    with note_native_calls(recorder.note), recorder:
        left_BTD, mixed = block(residual_BTD, delta_BTD, meta, own_state)
    after = [leaf for leaf in tree_leaves(mixed.state) if leaf is not None]
    passed = left_BTD, mixed.y_BTD, mixed.state
    if recorder.is_spoiled() or [leaf.shape for leaf in after] != [leaf.shape for leaf in own]:
        return None, passed
    for place, value in zip(own, after, strict=True):
        place.copy_(value)  # the state that the next token reads
        recorder.repeats.append(partial(place.copy_, value))
    kept = (recorder.kept, own, after)
    given, left = (residual_BTD, delta_BTD), (left_BTD, mixed.y_BTD)
    return RecordedBlock(given, left, own_state, recorder.repeats, kept), passed


class Recorder(TorchDispatchMode):
    """Notes operations, each as a call that writes the same results to the same memory; `known`: what they may read."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.repeats: list[Repeat] = []
        self.kept: list[object] = [*known]  # so that no memory is given to another tensor
        self._known = {_memory(tensor) for tensor in known}
        self._constants: set[int] = set()
        self._fault = False

    def is_spoiled(self) -> bool:
        """Whether something was computed that cannot be repeated."""
        return self._fault

    def note(self, call: NativeCall) -> None:
        """Note a call of C code."""
        self._check(call.tensors)
        function, pristine, size = call.function, bytes(call.given), ctypes.sizeof(call.given)
        place = ctypes.byref(call.given)

        def repeat() -> None:
            ctypes.memmove(place, pristine, size)  # C code counts in it
            function(place)

        self.kept.append(call)
        self.repeats.append(repeat)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute an operation and note it."""
        kwargs = kwargs or {}
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._check(read)
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        memories = {_memory(tensor) for tensor in read}
        name, tags = func._overloadpacket.__name__, func.tags
        self.kept.append((args, kwargs, result))
        if not made and not read:
            return result  # of types or numbers
        if not made or torch.Tag.nondeterministic_seeded in tags or torch.Tag.data_dependent_output in tags:
            self._fault = True
        elif func._schema.is_mutable:
            self._fault |= any(_memory(tensor) in self._constants for tensor in made)
            self.repeats.append(lambda: func(*args, **kwargs))
        elif all(_memory(tensor) in memories for tensor in made):
            pass  # a view
        elif name in _ZEROS:
            self.repeats.append(result.zero_)
        elif (not read and name not in _UNFILLED) or name in _FILLED:
            self._constants.update(map(_memory, made))
        elif name not in _UNFILLED:
            self._note_result(func, args, kwargs, result)
        self._known.update(map(_memory, made))
        return result

    def _note_result(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note an operation that makes a tensor by its form that writes to a given one."""
        form = find_form(func) if isinstance(result, Tensor) else None
        if form is None:
            self._fault = True
        else:
            self.repeats.append(lambda: form(*args, **kwargs, out=result))

    def _check(self, read: Sequence[Tensor | None]) -> None:
        self._fault |= any(tensor is not None and _memory(tensor) not in self._known for tensor in read)


def find_form(func: Any) -> Any:
    """The overload of an operation that writes its one result to `out`, None if there is none with the same arguments."""
    wanted = [(argument.name, str(argument.type)) for argument in func._schema.arguments]
    for overload in _overloads(func._overloadpacket):
        *arguments, last = overload._schema.arguments or (None,)
        if last is not None and last.name == "out" and last.is_out:
            found = [(argument.name, str(argument.type)) for argument in arguments]
            if found == wanted:
                return overload
    return None


def _overloads(packet: Any) -> Iterator[Any]:
    for name in packet.overloads():
        yield getattr(packet, name)


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
