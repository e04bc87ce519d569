"""Look into a store: is every part as it was written, and what text does a given sample of a run hold.

Reading checks what it reads (crc32c of chunks and indices), so training never uses damaged tokens. `verify_store` answers
before a run, for all parts, and checks what reading cannot: rules between arrays, and the digests of whole parts. It gives
all findings and does not stop at the first, so that a store is repaired once. `sample_text` uses the reader of the run
itself, which makes it an answer about what was trained on and not about what should have been.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import numpy.typing as npt

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.samples.packing import IGNORED_LABEL, describe_disorder
from amfm.data_pipeline.samples.samples import SampleReader, SampleSettings
from amfm.data_pipeline.store.manifest import Part, Split
from amfm.data_pipeline.store.shards import DamagedError
from amfm.data_pipeline.store.store import TokenStore, check_part_files
from amfm.data_pipeline.terminal import Report, silent
from amfm.data_pipeline.tokenizer.id_vocabulary import IdVocabulary
from amfm.data_pipeline.tokenizer.tokenizer import Tokenizer, load_tokenizer, require_marking

READ_TOKENS = 4 * 2**20


def verify_store(path: str | Path, *, full: bool = True, report: Report = silent) -> list[str]:
    """Check a store and return what is wrong with it, one line a finding; an empty list is a sound store.

    Quick: the manifest, the tokenizer, the presence and size of every shard, the crc32c of their indices and the
    document ends. Full also reads everything: the crc32c of each chunk, the digest of each part, ids inside the
    vocabulary, an end token at each document end. ValueError when the path is not a store.
    """
    problems: list[str] = []
    try:
        store = TokenStore.open(path)
    except DamagedError as error:
        return [str(error)]
    try:
        load_tokenizer(path)
    except (ValueError, RuntimeError) as error:
        problems.append(str(error))
    listed = store.list_files()
    parts = [part for _, _, part in store.all_parts()]
    done, total = 0, sum(sum(part.token_shards) for part in parts)
    for part in parts:
        report(f"verifying {path}", done, total)
        done += sum(part.token_shards)
        try:
            check_part_files(store.location, part, listed)
            problems += _verify_part(store, part, full=full)
        except DamagedError as error:
            problems.append(str(error))
    store.close()
    return problems


def _verify_part(store: TokenStore, part: Part, *, full: bool) -> list[str]:
    """Check one part; findings, or DamagedError for what cannot be read."""
    folder = f"{store.location}/{part.path}"
    ends = store.document_ends(part).astype(np.int64)
    problems = []
    if not (np.diff(ends, prepend=0) > 0).all():
        problems.append(f"{folder}: its document ends do not rise; prepare the part again")
    if (spans := store.loss_spans(part)) is not None and (fault := describe_disorder(spans, part.num_tokens)):
        problems.append(f"{folder}: {fault}; prepare the part again")
    if not full:
        store.read_tokens(part, part.num_tokens - 1, part.num_tokens)  # opens the last shard: its index is checked
        return problems
    largest, heads, chunk = 0, store.chunk_heads(part), store.layout.chunk_tokens
    for start in range(0, part.num_tokens, READ_TOKENS):
        tokens = store.read_tokens(part, start, min(part.num_tokens, start + READ_TOKENS))
        largest = max(largest, int(tokens.max()))
        begins = np.arange(-(-start // chunk) * chunk, start + len(tokens), chunk)
        if (tokens[begins - start] != heads[begins // chunk]).any():
            problems.append(f"{folder}: its chunk heads are not the first tokens of its chunks; prepare the part again")
        inside = ends[(ends > start) & (ends <= start + len(tokens))] - start - 1
        if (tokens[inside] != store.eos_id).any():
            problems.append(f"{folder}: a document ends without the end token {store.eos_id}; prepare the part again")
    if largest >= store.vocab_size:
        problems.append(f"{folder}: token id {largest} is outside the vocabulary of {store.vocab_size}")
    if store.digest_part(part) != part.digest:
        problems.append(f"{folder}: its files are not those of the manifest (digest); delete it and prepare again")
    return problems


@dataclass(frozen=True)
class SampleText:
    """What one global sample trains on. documents: text of each document piece in the row, in order.

    pieces: where only some tokens are learned or middles were moved, the same with control tokens, each document in runs of
    text and whether it is learned.
    """

    sample: int
    source: str
    epoch: int
    part: str
    row: int
    first_document: int
    tokens: tuple[int, ...]
    documents: tuple[str, ...]
    num_learned: int
    pieces: tuple[tuple[tuple[str, bool], ...], ...] = ()


def sample_text(
    config: DataConfig, sample: int, *, sequence_length: int, seed: int, split: Split = "train"
) -> SampleText:
    """Decode the row of a global sample number: a pure function of the settings, no run is needed.

    first_document: number of the row's first document within its part. Errors are those of PretrainLoader.
    """
    settings = SampleSettings.from_config(config, split=split, sequence_length=sequence_length, seed=seed)
    reader = SampleReader(settings)
    tokenizer = load_tokenizer(config.text_store())
    samples = np.array([sample], dtype=np.int64)
    (place,), (rows, _) = reader.locate(samples), reader.read(samples)
    row = rows[0]
    tokens = row.tokens[: min(row.num_valid, place.sequence_length)].astype(np.int64)
    cuts = [start for start in row.starts.tolist() if 0 < start < len(tokens)]
    pieces = np.split(tokens, cuts)
    labels = row.tokens[1:] if row.labels is None else row.labels
    learned = np.concatenate(([False], labels[: len(tokens) - 1] != IGNORED_LABEL))
    learned[cuts] &= not config.mask_document_boundaries
    shaped = row.labels is not None or place.source in settings.fim
    ends = reader.store.document_ends(place.part)
    first = int(np.searchsorted(ends, reader.first_token(place), side="right"))
    reader.store.close()
    return SampleText(
        sample=sample,
        source=place.source,
        epoch=place.epoch,
        part=place.part.path,
        row=place.row,
        first_document=first,
        tokens=tuple(tokens.tolist()),
        documents=tuple(
            " ".join(map(str, piece.tolist()))
            if tokenizer.kind == IdVocabulary.kind
            else tokenizer.decode(piece.tolist())
            for piece in pieces
        ),
        num_learned=int(learned.sum()),
        pieces=tuple(map(partial(_runs, tokenizer), pieces, np.split(learned, cuts))) if shaped else (),
    )


def _runs(
    tokenizer: Tokenizer, tokens: npt.NDArray[np.int64], learned: npt.NDArray[np.bool_]
) -> tuple[tuple[str, bool], ...]:
    """The runs of a document's tokens that are learned and that are not, as text with control tokens written out."""
    names = {index: text for text, index in require_marking(tokenizer, "a sample").control_tokens().items()}
    found = []
    for is_learned, run in groupby(zip(tokens.tolist(), learned.tolist()), key=itemgetter(1)):
        texts = [
            names[ids[0]] if is_control else tokenizer.decode(ids)
            for is_control, group in groupby((index for index, _ in run), key=names.__contains__)
            for ids in ([[index] for index in group] if is_control else [list(group)])
        ]
        found.append(("".join(texts), is_learned))
    return tuple(found)
