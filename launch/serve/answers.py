"""Answers as clients of OpenAI's completions read them: whole, or in pieces as they come."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from amfm.launch.serve.requests import RefusedError, Request
from amfm.launch.serve.served_model import ServedModel


@dataclass
class Answer:
    """One continuation under way: `pieces` yields its text; afterwards the counts and the reason it ended are set."""

    request: Request
    model: ServedModel
    prompt_ids: list[int]
    max_new_tokens: int
    num_tokens: int = 0
    finish_reason: str = "length"
    created: int = field(default_factory=lambda: int(time.time()))
    number: str = field(default_factory=lambda: secrets.token_hex(12))

    def pieces(self) -> Iterator[str]:
        """Yield the text in pieces, never a part of a stop text; ends at one, at the end of the text, or at the limit."""
        held = ""
        longest = max(map(len, self.request.stops), default=0)
        for piece in self.model.stream(self.prompt_ids, self._tokens()):
            held += piece
            at = min((place for stop in self.request.stops if (place := held.find(stop)) >= 0), default=-1)
            if at >= 0:
                self.finish_reason = "stop"
                if held[:at]:
                    yield held[:at]
                return
            # The end of what came may be the beginning of a stop text.
            safe = len(held) - max(0, longest - 1)
            if safe > 0:
                yield held[:safe]
                held = held[safe:]
        if held:
            yield held

    def _tokens(self) -> Iterator[int]:
        for token in self.model.generate(self.prompt_ids, self.max_new_tokens, self.request.sampling):
            self.num_tokens += 1
            yield token
        if self.num_tokens < self.max_new_tokens:
            self.finish_reason = "stop"

    def usage(self) -> dict[str, int]:
        """Tokens of the prompt and of the answer."""
        prompt = len(self.prompt_ids)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.num_tokens,
            "total_tokens": prompt + self.num_tokens,
        }

    def whole(self) -> dict[str, Any]:
        """Generate all of it and return one object."""
        text = "".join(self.pieces())
        if self.request.kind == "chat":
            choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}}
        else:
            choice = {"index": 0, "text": text}
        choice |= {"logprobs": None, "finish_reason": self.finish_reason}
        return self._frame([choice], "chat.completion") | {"usage": self.usage()}

    def chunks(self) -> Iterator[dict[str, Any]]:
        """Yield the objects of a stream: pieces, the reason of the end, and the counts where they were asked for."""
        kind = "chat.completion.chunk"
        if self.request.kind == "chat":
            yield self._frame([self._chunk_choice("", {"role": "assistant", "content": ""})], kind)
        for piece in self.pieces():
            yield self._frame([self._chunk_choice(piece, {"content": piece})], kind)
        yield self._frame([self._chunk_choice("", {}) | {"finish_reason": self.finish_reason}], kind)
        if self.request.wants_usage:
            yield self._frame([], kind) | {"usage": self.usage()}

    def _chunk_choice(self, text: str, delta: dict[str, str]) -> dict[str, Any]:
        content: dict[str, Any] = {"delta": delta} if self.request.kind == "chat" else {"text": text}
        return {"index": 0, **content, "logprobs": None, "finish_reason": None}

    def _frame(self, choices: list[dict[str, Any]], chat_kind: str) -> dict[str, Any]:
        is_chat = self.request.kind == "chat"
        return {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{self.number}",
            "object": chat_kind if is_chat else "text_completion",
            "created": self.created,
            "model": self.model.name,
            "choices": choices,
        }


def begin_answer(request: Request, model: ServedModel, max_tokens: int) -> Answer:
    """Encode a request's prompt, within `max_tokens` of prompt and answer together. Raises RefusedError."""
    longest = max(1, model.longest_token) * max_tokens
    if request.kind == "chat":
        _refuse_longer(sum(len(message["content"]) for message in request.messages), longest, max_tokens)
        try:
            text = model.render_chat(request.messages)
        except ValueError as error:
            raise RefusedError(str(error), key="messages") from error
        _refuse_longer(len(text), longest, max_tokens)
        ids = model.encode_chat(text)
    elif isinstance(request.prompt, str):
        _refuse_longer(len(request.prompt), longest, max_tokens)
        ids = model.tokenizer.encode(request.prompt)
    else:
        ids = list(request.prompt or [])
    vocabulary = model.shared.vocab_size
    if not ids or not all(0 <= index < vocabulary for index in ids):
        raise RefusedError(f"the prompt must have tokens, with ids of at least 0 and below {vocabulary}", key="prompt")
    room = max_tokens - len(ids)
    if room < 1 or (request.max_new_tokens or 1) > room:
        raise RefusedError(
            f"{len(ids)} tokens of prompt and {request.max_new_tokens or 1} of answer are more than the {max_tokens} that "
            "this server takes; ask for less, or start it with a larger --max-tokens",
            code="context_length_exceeded",
        )
    return Answer(request, model, ids, request.max_new_tokens or room)


def _refuse_longer(characters: int, longest: int, max_tokens: int) -> None:
    """Reject a prompt that cannot fit, before a core is kept busy with its tokens. Raises RefusedError."""
    if characters > longest:
        raise RefusedError(
            f"{characters} characters of prompt are more than the {longest} that {max_tokens} tokens can hold; ask for less, "
            "or start the server with a larger --max-tokens",
            code="context_length_exceeded",
        )
