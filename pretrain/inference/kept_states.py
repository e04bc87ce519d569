"""Text generation for several askers, with the decode states of texts that may continue kept between requests.

A conversation sends its whole text again with every turn. A decode state is what a model knows of the tokens so far, so
it is kept under exactly those tokens, and a request that begins with them pays only for the rest. A recurrent state cannot
be shortened: a kept one serves when all its tokens are at the beginning of the request. States are kept a little before
the end of a prompt (the last piece may be split otherwise when text follows), at its end and after the answer. The least
recently used ones go first. A kept state changes the speed of an answer, not the answer.

Several requests share the model: pieces of prompts take turns, and the next tokens of all texts that are being continued are
computed in one pass (rows.py). Texts join and leave between two tokens.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from amfm.model.hybrid import HybridModel
from amfm.model.mixers.interface import DecodeState
from amfm.model.state_size import count_bytes
from amfm.pretrain.inference.generate import Sampling, choose_token
from amfm.pretrain.inference.rows import advance, advance_rows

PROMPT_PIECE = 256  # tokens of a prompt in one pass: other requests get a turn between two
TAIL_TOKENS = 8
FEW_WEIGHTS = 1 << 26  # a token's products of fewer take less time than threads that wait for each other
JOIN_SECONDS = (
    0.005  # that a pass waits for texts which are about to ask; one whose client is slow does not hold up the others
)


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
        """Keep a state; the least recently used ones free space. One that is too large on its own is not kept."""
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


class NextToken(NamedTuple):
    """A token that a text continues with, and what the model makes of it: the state after it, and the logits."""

    state: DecodeState
    token: int
    answer: Future[tuple[DecodeState, Tensor]]


class SharedModel:
    """A model that several threads ask for continuations; `max_state_bytes` bounds what is kept between requests."""

    def __init__(self, model: HybridModel, *, vocab_size: int, max_state_bytes: int) -> None:
        self.model, self.vocab_size = model, vocab_size
        num_weights = sum(each.numel() for each in model.parameters())
        self.num_threads = 1 if num_weights < FEW_WEIGHTS else torch.get_num_threads()
        self.kept = KeptStates(max_state_bytes)
        self._turn = threading.Lock()
        self._asked: list[NextToken] = []
        self._joins = threading.Condition()
        self._num_texts = 0

    def generate(
        self, ids: Sequence[int], max_new_tokens: int, sampling: Sampling, end_ids: Collection[int]
    ) -> Iterator[int]:
        """Yield new token ids after `ids`, at most so many; one of `end_ids` ends the text and is not yielded.

        The state is kept when the text ends, and also when the caller stops asking.
        """
        seen = list(ids)
        state, logits_V = self._read_prompt(seen)
        generator = torch.Generator().manual_seed(sampling.seed)
        with self._joins:
            self._num_texts += 1
        try:
            for number in range(max_new_tokens):
                token = choose_token(logits_V, sampling, generator)
                if token in end_ids:
                    return
                yield token
                if number + 1 < max_new_tokens:
                    state, logits_V = self._read_token(state, token)
                    seen.append(token)
        finally:
            with self._joins:
                self._num_texts -= 1
                self._joins.notify_all()
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
                state, logits_V = advance(self.model, state, ids[done:stop])
                logits_V = logits_V[: self.vocab_size]
                if stop in stops:
                    self.kept.keep(ids[:stop], state, logits_V)
            done = stop
        assert logits_V is not None, "a prompt has a token"
        return state, logits_V

    def _read_token(self, state: DecodeState, token: int) -> tuple[DecodeState, Tensor]:
        """Read one more token of a text, in one pass with those of all texts that ask meanwhile.

        Whoever gets the turn computes for all: one text alone never waits for another thread, which on a machine of few
        processors would wait for threads of OpenMP that spin.
        """
        asked = NextToken(state, token, Future())
        with self._joins:
            self._asked.append(asked)
            self._joins.notify_all()
        with self._turn:
            if not asked.answer.done():
                self._answer_all()
        return asked.answer.result()

    def _answer_all(self) -> None:
        """Compute one more token of each text that asks, which are one at least; called by whoever has the turn."""
        with self._joins:
            self._joins.wait_for(lambda: len(self._asked) >= self._num_texts, timeout=JOIN_SECONDS)
            asked, self._asked = self._asked, []
        usual = torch.get_num_threads()
        torch.set_num_threads(self.num_threads)
        try:
            answers = advance_rows(self.model, [each.state for each in asked], [each.token for each in asked])
        except Exception as error:  # noqa: BLE001 - each of the threads that wait raises it
            for each in asked:
                each.answer.set_exception(error)
        else:
            for each, (state, logits_V) in zip(asked, answers, strict=True):
                each.answer.set_result((state, logits_V[: self.vocab_size]))
        finally:
            torch.set_num_threads(usual)
