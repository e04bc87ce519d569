"""Text generation for several askers, with the decode states of texts that may continue kept between requests.

A conversation sends its whole text again with every turn. A decode state is what a model knows of the tokens so far, so
it is kept under exactly those tokens, and a request that begins with them pays only for the rest. A recurrent state cannot
be shortened: a kept one serves when all its tokens are at the beginning of the request. States are kept a little before
the end of a prompt (the last piece may be split otherwise when text follows), at its end and after the answer. The least
recently used ones go first. A kept state changes the speed of an answer, not the answer.

Several requests share the model: pieces of prompts take turns, and the next tokens of all texts that are being continued are
computed in one pass (rows.py). Texts join and leave between two tokens, and run a few tokens ahead of slow clients.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict, deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amfm.model.hybrid import HybridModel
from amfm.model.mixers.interface import DecodeState
from amfm.model.state_size import count_bytes
from amfm.pretrain.inference.generate import Sampling, choose_token
from amfm.pretrain.inference.replay import advance
from amfm_serve.rows import TextRows

PROMPT_PIECE = 256  # tokens of a prompt in one pass: other requests get a turn between two
TAIL_TOKENS = 8
FEW_WEIGHTS = 1 << 26  # a token's products of fewer take less time than threads that wait for each other
MOST_AHEAD = 16  # tokens of a text that its client has not taken yet: then it rests, and does not hold up the others


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


class Continued:
    """A text that is continued: `seen` ids are in its state, `token` comes next, None where the text ends before it."""

    def __init__(self, ids: Sequence[int], sampling: Sampling, end_ids: Collection[int], most: int) -> None:
        self.seen, self.sampling, self.end_ids, self.most = list(ids), sampling, end_ids, most
        self.generator = torch.Generator().manual_seed(sampling.seed)
        self.logits_V = torch.empty(0)
        self.token: int | None = None
        self.ahead: deque[int] = deque()  # chosen, and not taken by whoever asked
        self.error: Exception | None = None

    def choose(self, logits_V: Tensor) -> None:
        """Choose the next token by the logits after those that were seen."""
        token = choose_token(logits_V, self.sampling, self.generator)
        self.logits_V, self.most = logits_V, self.most - 1
        self.token = None if token in self.end_ids else token
        if self.token is not None:
            self.ahead.append(self.token)

    def continues(self) -> bool:
        """Whether a pass should read the next token: someone wants what follows, and soon."""
        return self.token is not None and self.most > 0 and len(self.ahead) < MOST_AHEAD and self.error is None


class SharedModel:
    """A model that several threads ask for continuations; `max_state_bytes` bounds what is kept between requests."""

    def __init__(self, model: HybridModel, *, vocab_size: int, max_state_bytes: int) -> None:
        self.model, self.vocab_size = model, vocab_size
        num_weights = sum(each.numel() for each in model.parameters())
        self.num_threads = 1 if num_weights < FEW_WEIGHTS else torch.get_num_threads()
        self.kept, self.rows = KeptStates(max_state_bytes), TextRows(model)
        self._turn = threading.Lock()
        self._texts: dict[int, Continued] = {}
        self._numbers = itertools.count()

    def generate(
        self, ids: Sequence[int], max_new_tokens: int, sampling: Sampling, end_ids: Collection[int]
    ) -> Iterator[int]:
        """Yield new token ids after `ids`, at most so many; one of `end_ids` ends the text and is not yielded.

        The state is kept when the text ends, and also when the caller stops asking.
        """
        text, number = Continued(ids, sampling, end_ids, max_new_tokens), next(self._numbers)
        state, logits_V = self._read_prompt(text.seen)
        text.choose(logits_V)
        with self._turn:
            self.rows.join(number, state)
            self._texts[number] = text
        try:
            while text.ahead or self._read_tokens(text):
                yield text.ahead.popleft()
        finally:
            with self._turn:
                self._leave(number)

    def _leave(self, number: int) -> None:
        """Keep the state of a text that is over, but not after a pass that failed."""
        text, state = self._texts.pop(number), self.rows.leave(number)
        if text.error is None:
            self.kept.keep(text.seen, state, text.logits_V)

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

    def _read_tokens(self, text: Continued) -> bool:
        """Read one more token of all texts that continue; whether this one has another. Raises what its pass raised.

        Whoever finds none has the turn and computes for all: texts wait for no other thread, and no thread that is late for
        a pass makes it a smaller one.
        """
        with self._turn:
            if not text.ahead and text.continues():
                self._pass({number: each for number, each in self._texts.items() if each.continues()})
        if text.error is not None and not text.ahead:
            raise text.error
        return bool(text.ahead)

    def _pass(self, texts: dict[int, Continued]) -> None:
        """Read the next token of these texts in one pass, and choose those that follow."""
        tokens = {number: text.token for number, text in texts.items() if text.token is not None}
        usual = torch.get_num_threads()
        torch.set_num_threads(self.num_threads)
        try:
            logits = self.rows.read(tokens)
        except Exception as error:  # noqa: BLE001 - each of the threads that ask raises it
            for text in texts.values():
                text.error = error
        else:
            for number, text in texts.items():
                text.seen.append(tokens[number])
                try:
                    text.choose(logits[number][: self.vocab_size])
                except RuntimeError as error:  # of logits that cannot be drawn from: only of this text
                    text.error = error
        finally:
            torch.set_num_threads(usual)
