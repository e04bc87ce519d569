"""What is served: a model with its tokenizer, from a run, a checkpoint, an import or an export, and completions as in OpenAI's API.

A conversation's prompt has control tokens in it, which the template writes as text; so it is encoded by the folder's
tokenizer.json, which knows them. Text of a completion is text, as in training: control tokens written out in it end nothing.

Requests as clients of OpenAI's completions send them, checked: what cannot take effect is rejected, not ignored.

Answers as clients of OpenAI's completions read them: whole, or in pieces as they come.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from amfm.data_pipeline.durable.json_files import read_object
from amfm.data_pipeline.tokenizer.chat_template import ChatTemplate, make_template, read_template
from amfm.data_pipeline.tokenizer.huggingface import parse_tokenizer
from amfm.data_pipeline.tokenizer.tokenizer import Tokenizer
from amfm.launch.modules import is_transformers_folder, read_model
from amfm.pretrain.inference.generate import Sampling, stream_text
from amfm_serve.kept_states import SharedModel

if TYPE_CHECKING:
    import tokenizers


class ServedModel:
    """A named model that continues prompts, with the chat template of its folder where it has one."""

    def __init__(
        self,
        name: str,
        shared: SharedModel,
        tokenizer: Tokenizer,
        *,
        end_ids: Collection[int],
        template: ChatTemplate | None,
        chat_tokenizer: tokenizers.Tokenizer | None,
    ) -> None:
        self.name, self.shared, self.tokenizer = name, shared, tokenizer
        self.end_ids, self.template, self.chat_tokenizer = frozenset(end_ids), template, chat_tokenizer
        # Characters of the longest token: a text of more than this many a token is too long before it is tokenized.
        self.longest_token = max((len(tokenizer.decode([index])) for index in range(tokenizer.vocab_size)), default=1)

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        """Write a conversation as its template does. Raises ValueError without a template, and if it rejects."""
        if self.template is None or self.chat_tokenizer is None:
            raise ValueError(
                f"{self.name} has no chat template: it continues text and was not taught to answer; ask /v1/completions, "
                "or serve a model that was fine-tuned on conversations"
            )
        return self.template.render(messages)

    def encode_chat(self, text: str) -> list[int]:
        """Encode a conversation that `render_chat` wrote, where control tokens are tokens."""
        assert self.chat_tokenizer is not None, "render_chat rejects"
        return list(self.chat_tokenizer.encode(text, add_special_tokens=False).ids)

    def generate(self, ids: list[int], max_new_tokens: int, sampling: Sampling) -> Iterator[int]:
        """Yield the ids that follow."""
        return self.shared.generate(ids, max_new_tokens, sampling, self.end_ids)

    def stream(self, ids: list[int], tokens: Iterator[int]) -> Iterator[str]:
        """Decode ids as they come, in whole characters."""
        return stream_text(self.tokenizer, ids, tokens)


def load_model(path: Path, *, device: str, backend: str, max_state_bytes: int) -> ServedModel:
    """Load what `amfm generate` accepts, or a transformers folder of a class that we export to.

    A run that continues a released model has that model's chat template. Raises ValueError for anything else, and for a model
    without a tokenizer.
    """
    is_export, weights = is_transformers_folder(path), read_model(path)
    tokenizer = weights.tokenizer
    shared = SharedModel(
        weights.build(backend=backend, device=device),
        vocab_size=min(tokenizer.vocab_size, weights.model.vocab_size),
        max_state_bytes=max_state_bytes,
    )
    end_ids = {tokenizer.eos_id, *(read_end_ids(path) if is_export else ())}
    template = read_template(path) if is_export else None
    fast = parse_tokenizer((path / "tokenizer.json").read_bytes()) if template is not None else None
    if weights.released is not None and not is_export:
        template = make_template(weights.released.chat_template, weights.released.special_tokens)
        fast = fast_tokenizer(tokenizer) if template is not None else None
        end_ids |= set(list_ids(weights.released.generation.get("eos_token_id")))
    name = path.resolve().name
    return ServedModel(name, shared, tokenizer, end_ids=end_ids, template=template, chat_tokenizer=fast)


def read_end_ids(folder: Path) -> list[int]:
    """Read the ids that end a text by generation_config.json: a fine-tuned model ends its turns with another token."""
    path = folder / "generation_config.json"
    return list_ids(read_object(path).get("eos_token_id") if path.is_file() else None)


def list_ids(found: object) -> list[int]:
    """The ids of a field that holds one, several or none."""
    listed = found if isinstance(found, list) else [found]
    return [index for index in listed if isinstance(index, int) and not isinstance(index, bool)]


def fast_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer as the tokenizers library has it, in which control tokens that are written out are tokens."""
    from amfm.data_pipeline.tokenizer.sentencepiece_model import read_sentencepiece_model
    from amfm.pretrain.export.tokenizer import build_fast_tokenizer, tokenizer_json

    if tokenizer.kind != "sentencepiece":
        return parse_tokenizer(tokenizer_json(tokenizer))

    return build_fast_tokenizer(read_sentencepiece_model(tokenizer.to_bytes()))


Kind = Literal["completion", "chat"]
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions
NO_EFFECT: dict[str, tuple[Any, ...]] = {  # accepted only with these values, which ask for nothing
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
}
REMARKS = {"user", "metadata", "store", "service_tier", "parallel_tool_calls"}  # about the caller, not the answer
READ = {"model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed",
        "stop", "stream", "stream_options"}  # fmt: skip


class RefusedError(ValueError):
    """A request that cannot be served as it is; `status` and `code` are those of the HTTP answer, `key` names the field."""

    def __init__(self, message: str, *, key: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.key, self.status, self.code = key, status, code


@dataclass(frozen=True)
class Request:
    """A request for one continuation. `max_new_tokens` None: until the text ends."""

    kind: Kind
    prompt: str | list[int] | None
    messages: list[dict[str, str]]
    max_new_tokens: int | None
    sampling: Sampling
    stops: tuple[str, ...]
    is_stream: bool
    wants_usage: bool


def parse_request(kind: Kind, body: dict[str, Any], model_name: str) -> Request:
    """Check a request's body. Raises RefusedError naming the field, its value and what is possible."""
    if body.get("model", model_name) != model_name:
        raise RefusedError(
            f"model={body['model']!r:.100} is not served here; the one that is: {model_name}",
            key="model", status=404, code="model_not_found",
        )  # fmt: skip
    _refuse_without_effect(body)
    limit = body.get("max_completion_tokens", body.get("max_tokens"))
    if limit is None and kind == "completion":
        limit = COMPLETION_TOKENS
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise RefusedError(f"max_tokens={limit!r:.100} must be an integer of at least 1", key="max_tokens")
    options = body.get("stream_options") or {}
    return Request(
        kind=kind,
        prompt=_parse_prompt(body) if kind == "completion" else None,
        messages=_parse_messages(body) if kind == "chat" else [],
        max_new_tokens=limit,
        sampling=_parse_sampling(body),
        stops=_parse_stops(body.get("stop")),
        is_stream=bool(body.get("stream")),
        wants_usage=bool(isinstance(options, dict) and options.get("include_usage")),
    )


def _refuse_without_effect(body: dict[str, Any]) -> None:
    for key, value in body.items():
        if value is None or key in READ or key in REMARKS:
            continue
        if key not in NO_EFFECT:
            raise RefusedError(f"{key} is not known here; leave it out", key=key)
        if value not in NO_EFFECT[key]:
            raise RefusedError(f"{key}={value!r:.100} has no effect here; leave it out", key=key)


def _parse_prompt(body: dict[str, Any]) -> str | list[int]:
    """One text, or the ids of one; a list of one text counts as the text."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt and all(type(index) is int for index in prompt):
        return prompt
    raise RefusedError("prompt must be one text that is not empty, or a list of token ids", key="prompt")


def _parse_messages(body: dict[str, Any]) -> list[dict[str, str]]:
    """Messages of role and text; parts of text are joined, other parts (images, audio) rejected."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RefusedError("messages must be a list of at least one message", key="messages")
    parsed = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            raise RefusedError("a message must have a role and a content of text", key="messages")
        parsed.append({"role": message["role"], "content": content})
    return parsed


def _parse_sampling(body: dict[str, Any]) -> Sampling:
    values = {key: body[key] for key in ("temperature", "top_p", "top_k", "seed") if body.get(key) is not None}
    whole = {"top_k", "seed"}
    for key, value in values.items():
        is_right = isinstance(value, int if key in whole else int | float) and not isinstance(value, bool)
        if not is_right or abs(value) >= 2**63:
            raise RefusedError(f"{key}={value!r:.100} must be a {'whole ' if key in whole else ''}number", key=key)
    sampling = Sampling(**{"seed": secrets.randbits(62), **values})
    try:
        sampling.check()
    except ValueError as error:
        raise RefusedError(str(error)) from error
    return sampling


def _parse_stops(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(stop, str) and stop for stop in stops):
        raise RefusedError("stop must be a text or up to four, none empty", key="stop")
    return tuple(stops)


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
