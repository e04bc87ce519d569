"""Conversations as text, by the chat template that a model's folder brings, and which of that text the assistant wrote.

A pretrained model has no such template; one that was fine-tuned on conversations does (chat_template.jinja, or
chat_template in tokenizer_config.json), and no other format would be the one it knows. The template is someone else's
program: it runs in Jinja's sandbox for immutable values and sees only messages, tools and special tokens.

Two ways say what the assistant wrote. A template may mark it, as transformers reads it: `{% generation %}` around each turn.
Of any other the text up to a turn is written with and without the turn, and what the turn adds is the assistant's: so it is
what a model would have to answer after the prompt that serving writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from amfm.data_pipeline.durable.json_files import read_bounded, read_object

MAX_TEMPLATE_BYTES = 1 << 20
# By what a template calls: filters and operators raise what Python's own do. Jinja makes Python of it, which may have too many loops in
# each other (SyntaxError) or read a name before it is set.
RAISED = (
    TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NameError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
ASSISTANT = "assistant"
BEGIN, END = "\ufdd0", "\ufdd1"  # around a marked turn: Unicode keeps them for a program's own use

MOST_FOUND = 256  # turns of a record without marks: each costs two writings of what came before, marked ones none
NOTHING_LEARNED = "nothing of it would be learned"  # ends the reason of each record without

Span = tuple[int, int]


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{BEGIN}{caller()}{END}"


class ChatTemplate:
    """A chat template with the special tokens of its tokenizer. Raises ValueError for one that Jinja cannot read.

    has_clock: whether it may ask for the date, which text that is kept must not depend on.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, has_clock: bool = True) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        if has_clock:
            environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except RAISED as error:
            raise ValueError(f"the model's chat template cannot be read: {error}") from error
        self._special_tokens = dict(special_tokens)
        self._marks_turns = "endgeneration" in source

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Write messages as a prompt that the assistant's answer follows. Raises ValueError if the template rejects."""
        return self._render(messages, None, add_generation_prompt=True).replace(BEGIN, "").replace(END, "")

    def render_turns(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
    ) -> tuple[str, list[Span]]:
        """Write a whole conversation, with the spans of characters that the assistant wrote, in order.

        Raises ValueError if the template rejects them, if it says nothing certain about a turn, and without one that is not
        empty.
        """
        text = self._render(messages, tools, add_generation_prompt=False)
        text, spans = _cut_marks(text) if self._marks_turns else (text, self._find_turns(text, messages, tools))
        spans = [(start, stop) for start, stop in spans if stop > start]
        if not spans:
            raise ValueError(f"no assistant turn: {NOTHING_LEARNED}")
        return text, spans

    def _find_turns(self, text: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> list[Span]:
        spans = []
        turns = [number for number, message in enumerate(messages) if message.get("role") == ASSISTANT]
        if len(turns) > MOST_FOUND:
            raise ValueError(
                f"{len(turns):,} assistant turns, and at most {MOST_FOUND} are found in a template without marks; mark them in it "
                "with {% generation %}"
            )
        for number in turns:
            before = self._render(messages[:number], tools, add_generation_prompt=True)
            through = self._render(messages[: number + 1], tools, add_generation_prompt=False)
            if not (text.startswith(through) and through.startswith(before)):
                raise ValueError(
                    f"the chat template writes turn {number + 1} in another way when something follows it, so that what the assistant "
                    "wrote is not certain; mark it in the template with {% generation %}"
                )
            spans.append((len(before), len(through)))
        return spans

    def _render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, *, add_generation_prompt: bool
    ) -> str:
        try:
            return self._template.render(
                messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **self._special_tokens
            )
        except RAISED as error:
            raise ValueError(f"the model's chat template rejects these messages: {error}") from error


def _cut_marks(text: str) -> tuple[str, list[Span]]:
    """A text without its marks, and what was between them."""
    pieces, spans, length = [], [], 0
    for number, piece in enumerate(text.split(BEGIN)):
        inside, mark, after = piece.partition(END)
        if (number > 0) != bool(mark) or END in after:
            raise ValueError(
                "the chat template has marks of turns within each other, or a message holds U+FDD0 or U+FDD1"
            )
        if mark:
            spans.append((length, length + len(inside)))
        pieces += [inside, after]
        length += len(inside) + len(after)
    return "".join(pieces), spans


def _to_json(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
    """As transformers' templates have it: Jinja's own filter writes text for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **settings)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def read_template(folder: Path) -> ChatTemplate | None:
    """Read the chat template of a transformers folder; None if it has none."""
    return make_template(*read_template_text(folder))


def read_template_text(folder: Path) -> tuple[object, dict[str, Any]]:
    """The chat template of a transformers folder as it is written, with the settings of its tokenizer."""
    path, settings_path = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    settings = read_object(settings_path) if settings_path.is_file() else {}
    source = settings.get("chat_template")
    if path.is_file():
        source = read_bounded(path, MAX_TEMPLATE_BYTES).decode("utf-8", errors="replace")
    return source, settings


def make_template(source: object, settings: Mapping[str, Any]) -> ChatTemplate | None:
    """The template of a text, or of several by name; None for neither. settings: with the texts of special tokens."""
    text = text_of_template(source)
    return None if text is None else ChatTemplate(text, special_texts(settings))


def text_of_template(source: object) -> str | None:
    """The text of a template, or of the default one of several; None for neither."""
    if isinstance(source, list):  # several by name
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
    return source if isinstance(source, str) else None


def special_texts(settings: Mapping[str, Any]) -> dict[str, str]:
    """The texts of special tokens that a tokenizer_config.json names, as text or as objects."""
    found = {}
    for name in SPECIAL:
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text:
            found[name] = text
    return found
