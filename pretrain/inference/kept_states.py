"""Text generation for several askers, with the decode states of texts that may continue kept between requests.

A conversation sends its whole text again with every turn. A decode state is what a model knows of the tokens so far, so
it is kept under exactly those tokens, and a request that begins with them pays only for the rest. A recurrent state cannot
be shortened: a kept one serves when all its tokens are at the beginning of the request. States are kept a little before
the end of a prompt (the last piece may be split otherwise when text follows), at its end and after the answer. The least
recently used ones go first. A kept state changes the speed of an answer, not the answer.

Several requests take turns, a token or a piece of a prompt at a time; each has its own state.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amfm.model.hybrid import HybridModel
from amfm.model.mixers.interface import DecodeState
from amfm.model.packing import PackMeta
from amfm.model.state_size import count_bytes
from amfm.pretrain.inference.generate import Sampling, choose_token

PROMPT_PIECE = 256  # tokens of a prompt in one pass: other requests get a turn between two, and logits stay small
TAIL_TOKENS = 8


@dataclass(frozen=True)
class KeptState:
    """A decode state and the logits [V] of its last token, float32 on the CPU; `num_bytes` of both."""

    state: DecodeState
    logits_V: Tensor
    num_bytes: int


class KeptStates:
    """Decode states by the tokens that they have seen, at most `max_bytes` in all; for one thread at a time."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._kept: OrderedDict[tuple[int, ...], KeptState] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, ids: Sequence[int]) -> tuple[int, KeptState | None]:
        """Find the state that has seen most of the beginning of `ids`: (how many tokens, the state)."""
        wanted = tuple(ids)
        fitting = [key for key in self._kept if wanted[: len(key)] == key]
        if not fitting:
            return 0, None
        longest = max(fitting, key=len)
        self._kept.move_to_end(longest)
        return len(longest), self._kept[longest]

    def keep(self, ids: Sequence[int], state: DecodeState, logits_V: Tensor) -> None:
        """Keep a state; the least recently used ones free space. One that alone is too large is not kept."""
        key, size = tuple(ids), state_bytes(state) + logits_V.numel() * logits_V.element_size()
        if size > self.max_bytes:
            return
        old = self._kept.pop(key, None)
        self.num_bytes += size - (old.num_bytes if old is not None else 0)
        self._kept[key] = KeptState(state, logits_V, size)
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= self._kept.popitem(last=False)[1].num_bytes


def state_bytes(state: DecodeState) -> int:
    """Count the bytes of the tensors of a decode state."""
    return count_bytes(state.blocks)


class SharedModel:
    """A model that several threads ask for continuations; `max_state_bytes` bounds what is kept between requests."""

    def __init__(self, model: HybridModel, *, vocab_size: int, max_state_bytes: int) -> None:
        self.model, self.vocab_size = model, vocab_size
        self.kept = KeptStates(max_state_bytes)
        self._turn = threading.Lock()

    def generate(
        self, ids: Sequence[int], max_new_tokens: int, sampling: Sampling, end_ids: Collection[int]
    ) -> Iterator[int]:
        """Yield new token ids after `ids`, at most so many; one of `end_ids` ends the text and is not yielded.

        The state is kept when the text ends, and also when the caller stops asking.
        """
        seen = list(ids)
        state, logits_V = self._read_prompt(seen)
        generator = torch.Generator().manual_seed(sampling.seed)
        try:
            for number in range(max_new_tokens):
                token = choose_token(logits_V, sampling, generator)
                if token in end_ids:
                    return
                yield token
                if number + 1 < max_new_tokens:
                    with self._turn:
                        state, logits_V = self._advance(state, [token])
                    seen.append(token)
        finally:
            with self._turn:
                self.kept.keep(seen, state, logits_V)

    def _read_prompt(self, ids: list[int]) -> tuple[DecodeState, Tensor]:
        """Bring a state to the end of a prompt, from the longest kept beginning, and keep it there and shortly before."""
        with self._turn:
            done, kept = self.kept.find(ids)
        state, logits_V = (kept.state, kept.logits_V) if kept is not None else (self.model.empty_state(1), None)
        stops = {len(ids) - TAIL_TOKENS, len(ids)}
        while done < len(ids):
            stop = min([done + PROMPT_PIECE, *(stop for stop in stops if stop > done)])
            with self._turn:
                state, logits_V = self._advance(state, ids[done:stop])
                if stop in stops:
                    self.kept.keep(ids[:stop], state, logits_V)
            done = stop
        assert logits_V is not None, "a prompt has a token"
        return state, logits_V

    @torch.inference_mode()
    def _advance(self, state: DecodeState, ids: Sequence[int]) -> tuple[DecodeState, Tensor]:
        device = self.model.head_weight().device
        meta = PackMeta.one_document_a_row(1, len(ids), start=state.length, device=device)
        output = self.model(torch.tensor([list(ids)], device=device), meta, state=state)
        assert output.logits_BTV is not None and output.state is not None, "a state was given and no labels"
        return output.state, output.logits_BTV[0, -1, : self.vocab_size].float().cpu().clone()
