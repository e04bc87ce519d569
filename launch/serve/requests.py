"""Requests as clients of OpenAI's completions send them, checked: what cannot take effect is rejected, not ignored."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, Literal

from amfm.pretrain.inference.generate import Sampling

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
