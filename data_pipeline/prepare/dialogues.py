"""Records of which a part is learned: conversations by a chat template, and prompts with their completions.

A record becomes a document whose text has spans of characters that count. Everything else about it is as with text: filters,
duplicates and the split see the text as it was written. A record of which nothing would be learned is a reject.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from amfm.data_pipeline.config import SourceConfig, TokenizerConfig
from amfm.data_pipeline.durable.json_files import read_bounded
from amfm.data_pipeline.tokenizer.chat_template import (
    MAX_TEMPLATE_BYTES,
    NOTHING_LEARNED,
    ChatTemplate,
    Span,
    read_template_text,
    special_texts,
    text_of_template,
)
from amfm.data_pipeline.tokenizer.tokenizer import Tokenizer, require_marking

TOOLS = "tools"


@dataclass(frozen=True)
class Dialogues:
    """Which fields of a record make a document, and how; all that decides it, so that units of another template are others.

    columns: one with messages, or a prompt and its completion. template: Jinja, for messages. special_tokens: its texts.
    control_tokens: texts that no message may hold, or it would end its own turn.
    """

    columns: tuple[str, ...]
    template: str | None = None
    special_tokens: tuple[tuple[str, str], ...] = ()
    control_tokens: tuple[str, ...] = ()

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """Fields that are read where a file has them."""
        return () if self.template is None else (TOOLS,)

    def read(self, record: Mapping[str, Any]) -> tuple[str, list[Span]]:
        """The text of a record and its spans of characters that count. Raises ValueError for one that gives no document."""
        missing = [name for name in self.columns if record.get(name) is None]
        if missing:
            raise ValueError(f"no field {missing[0]!r}")
        if self.template is not None:
            return self._read_messages(record[self.columns[0]], record.get(TOOLS))
        prompt, completion = (record[name] for name in self.columns)
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise ValueError(f"fields {self.columns[0]!r} and {self.columns[1]!r} must be text")  # noqa: TRY004 - of a record
        if not completion:
            raise ValueError(f"field {self.columns[1]!r} is empty: {NOTHING_LEARNED}")
        return prompt + completion, [(len(prompt), len(prompt) + len(completion))]

    def _read_messages(self, messages: Any, tools: Any) -> tuple[str, list[Span]]:
        messages, tools = (_parse(value) for value in (messages, tools))
        if not isinstance(messages, list) or not all(isinstance(item, dict) and "role" in item for item in messages):
            raise ValueError(f"field {self.columns[0]!r} is not a list of messages with a role")
        messages, tools = _without_none(messages), _without_none(tools)
        if self.control_tokens:
            pattern = _any_of(self.control_tokens)
            for text in _texts(messages):
                if found := pattern.search(text):
                    raise ValueError(f"a message holds the control token {found[0]!r} as text, which would become one")
        return _make_template(self.template or "", self.special_tokens).render_turns(messages, tools)


def dialogues_of(source: SourceConfig, settings: TokenizerConfig, tokenizer: Tokenizer | None) -> Dialogues | None:
    """What a source reads instead of text; None for one of text. tokenizer: None while it is being trained.

    Raises ValueError for messages without a template, and for a tokenizer that cannot mark what counts.
    """
    what = f"source {source.name!r} has {describe_columns(source)}, which"
    if source.prompt_column is not None and source.completion_column is not None:
        if tokenizer is not None:
            require_marking(tokenizer, what)
        return Dialogues((source.prompt_column, source.completion_column))
    if source.messages_column is None:
        return None
    control = (
        dict.fromkeys(settings.control_tokens, -1)
        if tokenizer is None
        else require_marking(tokenizer, what).control_tokens()
    )
    template, named = _find_template(settings)
    if template is None:
        raise ValueError(
            f"source {source.name!r} has messages_column, and no chat template is next to data.tokenizer.model; name a Jinja "
            "file in data.tokenizer.chat_template"
        )
    ends = [text for text, index in control.items() if tokenizer is not None and index == tokenizer.eos_id]
    special = ({"eos_token": ends[0]} if ends else {}) | special_texts(named)
    ChatTemplate(template, special)  # now, and not in each process
    return Dialogues((source.messages_column,), template, tuple(sorted(special.items())), tuple(sorted(control)))


def columns_of(source: SourceConfig) -> dict[str, str]:
    """The fields that a source reads, by the setting that names each."""
    settings = ("messages_column", "prompt_column", "completion_column")
    named = {setting: getattr(source, setting) for setting in settings if getattr(source, setting) is not None}
    return named or {"text_column": source.text_column}


def describe_columns(source: SourceConfig) -> str:
    """The settings that say which fields a source reads."""
    if source.template is not None:
        return f"template={source.template!r}"
    return " and ".join(f"{setting}={name!r}" for setting, name in columns_of(source).items())


def _find_template(settings: TokenizerConfig) -> tuple[str | None, Mapping[str, Any]]:
    """The text of the chat template, and what names special tokens."""
    source, named = read_template_text(Path(settings.model).parent) if settings.model else (None, {})
    if settings.chat_template is None:
        return text_of_template(source), named
    path = Path(settings.chat_template)
    if not path.is_file():
        raise ValueError(f"data.tokenizer.chat_template={settings.chat_template!r} does not exist; name a Jinja file")
    return read_bounded(path, MAX_TEMPLATE_BYTES).decode("utf-8", errors="replace"), named


@lru_cache(maxsize=4)
def _make_template(source: str, special_tokens: tuple[tuple[str, str], ...]) -> ChatTemplate:
    return ChatTemplate(source, dict(special_tokens), has_clock=False)


@lru_cache(maxsize=4)
def _any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)))


def _parse(value: Any) -> Any:
    """A value that a table may hold as the text of its JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"messages or tools are a text that is not JSON: {error}") from error


def _without_none(value: Any) -> Any:
    """Without fields that a table has only for other records."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _texts(value: Any) -> Iterator[str]:
    """Every text in messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _texts(item)
