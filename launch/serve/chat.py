"""Conversations as the text of a prompt, by the chat template that a model's folder brings.

A pretrained model has no such template; one that was fine-tuned on conversations does (chat_template.jinja, or
chat_template in tokenizer_config.json), and no other format would be the one it knows. The template is someone else's
program: it runs in Jinja's sandbox for immutable values and sees messages and special tokens alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from amfm.data_pipeline.durable.foreign_files import read_bounded, read_object

MAX_TEMPLATE_BYTES = 1 << 20
# By what a template calls: filters and operators raise what Python's own do.
RAISED = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    """A chat template with the special tokens of its tokenizer. Raises ValueError for one that Jinja can't read."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError, MemoryError) as error:
            raise ValueError(f"the model's chat template can't be read: {error}") from error
        self._special_tokens = special_tokens

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """Write messages as a prompt that the assistant's answer follows. Raises ValueError where the template refuses."""
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._special_tokens)
        except RAISED as error:
            raise ValueError(f"the model's chat template refuses these messages: {error}") from error


def _refuse(message: str) -> None:
    raise TemplateError(message)


def read_template(folder: Path) -> ChatTemplate | None:
    """Read the chat template of a transformers folder; None where it has none."""
    path, settings_path = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    settings = read_object(settings_path) if settings_path.is_file() else {}
    source = settings.get("chat_template")
    if path.is_file():
        source = read_bounded(path, MAX_TEMPLATE_BYTES).decode("utf-8", errors="replace")
    return make_template(source, settings)


def make_template(source: object, settings: Mapping[str, Any]) -> ChatTemplate | None:
    """The template of a text, or of several by name; None for neither. settings: with the texts of special tokens."""
    if isinstance(source, list):  # several by name
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        return None
    special = {name: _token_text(settings.get(name)) for name in SPECIAL}
    return ChatTemplate(source, {name: text for name, text in special.items() if text})


def _token_text(value: object) -> str:
    """The text of a special token, which the file gives as text or as an object."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""
