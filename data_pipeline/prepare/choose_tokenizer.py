"""The tokenizer of a store: the one that is there, the file that is given, one trained on the sources, or of ids none.

A store has one tokenizer, because ids of two mean nothing next to each other. What it was asked for is next to it, so
that a second preparation can tell whether it is still the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from amfm.data_pipeline.config import DataConfig, SourceConfig
from amfm.data_pipeline.durable.files import write_file_atomically
from amfm.data_pipeline.durable.json_files import read_object
from amfm.data_pipeline.prepare.dialogues import describe_columns, dialogues_of
from amfm.data_pipeline.prepare.documents import NAME_TOKENIZER, SegmentReader
from amfm.data_pipeline.prepare.reading import make_filter, reading_of
from amfm.data_pipeline.prepare.records import Document, Reject, TokenDocument
from amfm.data_pipeline.prepare.rejects import place_of
from amfm.data_pipeline.prepare.segments import Segment, holds_tokens
from amfm.data_pipeline.prepare.sources import KIND_BY_SUFFIX, TOKEN_KINDS
from amfm.data_pipeline.tokenizer.id_vocabulary import IdVocabulary
from amfm.data_pipeline.tokenizer.tokenizer import Tokenizer, read_tokenizer_file, tokenizer_files


def require_training_text(config: DataConfig, plans: Mapping[str, Sequence[Segment]]) -> None:
    """Reject a source with weight none of whose records is text, before the trainer complains that it got nothing.

    Reads each source up to its first text. Raises ValueError with the first record that was rejected.
    """
    for source in config.sources:
        first: Reject | None = None
        number = 0
        for item in _read_records(source, plans[source.name], config) if source.weight else ():
            if not isinstance(item, Reject):
                break
            first, number = first or item, number + 1
        else:
            if first is not None:
                raise ValueError(
                    f"source {source.name!r} gave no text to train the tokenizer on: {number} records were rejected, the "
                    f"first ({place_of(first.position, plans[source.name])}) for: {first.reason}; check {describe_columns(source)} and the files"
                )


def training_texts(config: DataConfig, plans: Mapping[str, Sequence[Segment]]) -> Iterator[str]:
    """Yield `data.tokenizer.training_bytes` of text, shared by the weights of the sources; validation files left out."""
    total_weight = sum(source.weight for source in config.sources)
    for source in config.sources:
        budget = config.tokenizer.training_bytes * source.weight / total_weight
        if budget <= 0:
            continue
        for item in _read_records(source, plans[source.name], config):
            if isinstance(item, TokenDocument):
                raise ValueError(f"source {source.name!r} holds tokens{NAME_TOKENIZER}")  # noqa: TRY004 - a setting is wrong
            if isinstance(item, Document):
                text = _without(config.tokenizer.control_tokens, item.text[: int(budget) + 1])
                budget -= len(text.encode())
                yield text
            if budget <= 0:
                break


def _without(control_tokens: Sequence[str], text: str) -> str:
    """A text without what a chat template writes: no text is to become these tokens."""
    for token in control_tokens:
        text = text.replace(token, "\n")
    return text


def _read_records(
    source: SourceConfig, plan: Sequence[Segment], config: DataConfig
) -> Iterator[Document | TokenDocument | Reject]:
    reason_to_drop, dialogues = make_filter(source.filters, source.name), dialogues_of(source, config.tokenizer, None)
    reading = reading_of(source, (segment.file for segment in plan))
    for segment in plan:
        if segment.split != "validation":
            yield from SegmentReader(segment, source.text_column, reason_to_drop, dialogues=dialogues, reading=reading)


FIRST_DOCUMENTS = 64  # of a source, whose last tokens are compared
TOKENIZER_SETTINGS = "tokenizer_settings.json"


def choose_tokenizer(
    store: Path,
    config: DataConfig,
    plans: Mapping[str, Sequence[Segment]],
    begin_training: Callable[[], None],
    vocab_size: int | None = None,
) -> tuple[Tokenizer, dict[str, Any] | None]:
    """Choose the store's tokenizer: kept if it has one of the same settings, else loaded or trained.

    Returns it with the settings to keep next to it, None where they are there. `begin_training` is called before one is
    trained. vocab_size: of the model, for sources of token ids. Raises ValueError if the store has another one.
    """
    settings_file, wanted = store / TOKENIZER_SETTINGS, config.tokenizer
    given: Tokenizer | None = (
        read_tokenizer_file(Path(wanted.model), wanted.eos_token)
        if wanted.model
        else choose_id_vocabulary(config, plans, vocab_size)
    )
    left_out = {"model", "eos_token", "chat_template", *(() if wanted.control_tokens else ("control_tokens",))}
    settings = {"given": given.identity()} if given else {"trained": wanted.model_dump(mode="json", exclude=left_out)}
    files = [store / name for name in tokenizer_files() if (store / name).exists()]
    if settings_file.exists() and files:
        before = read_object(settings_file)
        if before != settings:
            raise ValueError(
                f"data.tokenizer is {_describe_tokenizer(settings, before)}, but the store {store} was prepared with "
                f"{_describe_tokenizer(before, settings)}; one store has one tokenizer: name another data.store, or delete "
                "this one to prepare it again"
            )
        # The given file knows its end token by what is next to it, which the store's copy does not have.
        return given or read_tokenizer_file(files[0], wanted.eos_token), None
    if given is None:
        begin_training()
        require_training_text(config, plans)
        from amfm.data_pipeline.tokenizer.sentencepiece_model import train_tokenizer  # needs protobuf

        given = train_tokenizer(training_texts(config, plans), wanted)
    return given, settings


def choose_id_vocabulary(
    config: DataConfig, plans: Mapping[str, Sequence[Segment]], vocab_size: int | None
) -> IdVocabulary | None:
    """The vocabulary of sources that are all token ids, by their files or because an end id is given; None if all are text.

    Raises ValueError if only some are, and for an end token that is not one of the ids.
    """
    files = {name: [segment.file for segment in plan] for name, plan in plans.items()}
    end = config.tokenizer.eos_token
    of_ids = [
        source
        for source in config.sources
        if isinstance(end, int) or holds_tokens(files[source.name], source.text_column)
    ]
    if not of_ids and end is not None:
        raise ValueError(
            f"data.tokenizer.eos_token={end!r} is of a tokenizer.json or of sources of token ids; name the file in "
            "data.tokenizer.model, or remove it"
        )
    if not of_ids:
        return None
    if vocab_size is None or len(of_ids) < len(config.sources):
        raise ValueError(f"source {of_ids[0].name!r} holds tokens{NAME_TOKENIZER}")
    if isinstance(end, str) or (end is not None and not 0 <= end < vocab_size):
        raise ValueError(
            f"data.tokenizer.eos_token={end!r} must be an id below model.vocab_size={vocab_size}, because there is no tokenizer; "
            "give the number that ends documents"
        )
    return IdVocabulary(vocab_size, find_end(of_ids, plans) if end is None else end)


def names_only_ids(config: DataConfig) -> bool:
    """Whether the sources are token ids without a tokenizer, as far as their names say: files of ids, or prefixes of some."""
    paths = [path for source in config.sources for path in source.paths]
    are_ids = [
        KIND_BY_SUFFIX.get(Path(path).suffix) in TOKEN_KINDS or "://" in path or Path(f"{path}.idx").is_file()
        for path in paths
    ]
    return isinstance(config.tokenizer.eos_token, int) or all(are_ids)


def find_end(sources: Sequence[SourceConfig], plans: Mapping[str, Sequence[Segment]]) -> int:
    """The id with which the first documents of all sources end. Raises ValueError if they do not end alike, or are too few."""
    ends = list[int]()
    for source in sources:
        plan = plans[source.name]
        if any(segment.file.kind == "nanogpt" for segment in plan):
            raise ValueError(
                f"source {source.name!r} has files in which only the end token cuts documents; give its id in "
                "data.tokenizer.eos_token"
            )
        reading = reading_of(source, (segment.file for segment in plan))
        items = (item for each in plan for item in SegmentReader(each, source.text_column, None, reading=reading))
        documents = (item for item in items if isinstance(item, TokenDocument))
        ends += [int(document.tokens[-1]) for document in islice(documents, FIRST_DOCUMENTS)]
    if len(ends) < 2 or len(set(ends)) > 1:
        found = f"end with {', '.join(map(str, sorted(set(ends))[:4]))}" if ends else "are not there"
        raise ValueError(
            f"the token that ends a document is not known: the first {len(ends)} documents of the sources {found}; give its id in "
            "data.tokenizer.eos_token (documents without it get it)"
        )
    return ends[0]


def keep_tokenizer(store: Path, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    """Write the tokenizer into the store, then what was asked for."""
    write_file_atomically(store / tokenizer.file_name, tokenizer.to_bytes())
    write_file_atomically(store / TOKENIZER_SETTINGS, json.dumps(settings).encode())


def _describe_tokenizer(settings: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """A tokenizer of `tokenizer_settings.json` in words; of trained ones only the settings in which they differ."""
    if "given" in settings:
        return f"a file (tokenizer {settings['given']})"
    trained, beside = settings.get("trained", {}), other.get("trained", {})
    differing = [f"{name}={value}" for name, value in trained.items() if beside.get(name) != value]
    return f"trained here with {', '.join(differing)}" if beside and differing else "one trained here on the sources"
