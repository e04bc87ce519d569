"""What the manifest of a token store records: layout, tokenizer and parts, and the identity that follows from them.

The manifest is one JSON file, written last: a store without one is not there yet, so no reader sees half of it. It names
the bytes of every shard file and a digest of every part, and its own identity is a digest of all that. So a checkpoint can
name the data that it was trained on in 32 characters, a copy is checked without the original, and an edited manifest is
noticed when it is opened. Nothing in it depends on the machine, the time or the order in which parts were written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from amfm.data_pipeline.durable.files import digest_files, write_file_atomically
from amfm.data_pipeline.durable.json_files import MAX_JSON_BYTES
from amfm.data_pipeline.store.shards import Compression, DamagedError

FORMAT_VERSION = 3
LOSS_SPANS_VERSION = (
    4  # of a store with parts that are learned in part, which a program that knows only 3 would learn whole
)
MANIFEST = "manifest.json"
MAX_SHARD_TOKENS = 64 * 2**20
DOCUMENT_CHUNK = 8192
MAX_PARTS = MAX_JSON_BYTES // 512  # of a manifest, whose readers take no more bytes; a part is about 470 of them
PART_PATH = re.compile(r"parts/[A-Za-z0-9_-][A-Za-z0-9_.-]*/(train|validation)-\d{6,}-\d{2,}\.zarr")
PART_NAME = re.compile(r"(train|validation)-\d{6,}-\d{2,}\.zarr")

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

COMPRESSION_BY_PRESET: dict[str, Compression] = {"fast": "none", "balanced": "lz4hc", "small": "zstd"}


@dataclass(frozen=True, slots=True)
class Layout:
    """How arrays are cut and encoded; the same for every part of a store. Units: tokens."""

    dtype: str
    chunk_tokens: int
    preset: str

    @staticmethod
    def for_vocabulary(vocab_size: int, chunk_tokens: int, preset: str) -> Layout:
        """Choose the dtype: uint16 where every id fits, else uint32; a larger vocabulary is a ValueError."""
        if vocab_size > 2**32:
            raise ValueError(f"tokenizer vocabulary {vocab_size} must be at most {2**32}, the limit of uint32 tokens")
        return Layout("uint16" if vocab_size <= 2**16 else "uint32", chunk_tokens, preset)

    @property
    def compression(self) -> Compression:
        """Codec of the preset."""
        return COMPRESSION_BY_PRESET[self.preset]


@dataclass(frozen=True, slots=True)
class Part:
    """One part as the manifest records it.

    path: relative to the store. token_shards, document_shards, head_shards: bytes of each shard file. digest: BLAKE3 of all
    files of the part, names included. opening_digest: of what every opening of the part reads, so that a part of another
    store is noticed immediately; empty if the part was written before there was one. num_spans: runs of tokens that are
    learned, whose edges are in span_shards; none where all tokens are.
    """

    path: str
    num_tokens: int
    num_documents: int
    text_bytes: int
    token_shards: tuple[int, ...]
    document_shards: tuple[int, ...]
    head_shards: tuple[int, ...]
    digest: str
    opening_digest: str = ""
    num_spans: int = 0
    span_shards: tuple[int, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Make a record for `from_json`, which has no more than earlier releases where all tokens are learned."""
        record = asdict(self)
        if not self.num_spans:
            del record["num_spans"], record["span_shards"]
        return record

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Part:
        """Invert `as_json` after JSON. Raises DamagedError for a path that is not a part's.

        The path is checked because files are opened by it, and a manifest may have been written by someone else.
        """
        if not PART_PATH.fullmatch(str(record["path"])):
            raise DamagedError(
                f"a part is at {str(record['path'])!r:.200}, which is not a place of a part below a store"
            )
        return Part(
            record["path"],
            record["num_tokens"],
            record["num_documents"],
            record["text_bytes"],
            tuple(record["token_shards"]),
            tuple(record["document_shards"]),
            tuple(record.get("head_shards", ())),  # a journal of format 1 has none, and its units are written again
            record["digest"],
            record.get("opening_digest", ""),
            record.get("num_spans", 0),
            tuple(record.get("span_shards", ())),
        )


def digest_opening(
    document_ends: npt.NDArray[np.uint64],
    chunk_heads: npt.NDArray[np.generic],
    loss_spans: npt.NDArray[np.uint64] | None,
) -> str:
    """BLAKE3 of the document ends and chunk heads of a part, which its tokens decide, and of its loss spans if it has any."""
    arrays = {"document_ends": document_ends, "chunk_heads": chunk_heads}
    if loss_spans is not None:
        arrays["loss_spans"] = loss_spans
    return digest_files([(name, values.tobytes()) for name, values in arrays.items()])


@dataclass(frozen=True, slots=True)
class TokenizerRecord:
    """What the manifest says about the tokenizer; `file` is relative to the store."""

    file: str
    kind: str
    identity: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int | None


def shard_length(length: int, chunk: int, limit: int) -> int:
    """Choose the values of a shard: one shard for the whole array up to the limit; a multiple of the chunk, one at least.

    Few files, because a file costs an inode and an open; a limit, because a shard is encoded in memory.
    """
    limit = max(chunk, limit // chunk * chunk)
    return min(limit, max(chunk, -(-length // chunk) * chunk))


PartsBySource = Mapping[str, Mapping[Split, Sequence[Part]]]


def write_manifest(
    store: Path,
    tokenizer: TokenizerRecord,
    layout: Layout,
    sources: PartsBySource,
    revisions: Mapping[str, str] = {},
    code: Mapping[str, Mapping[str, str]] = {},
) -> str:
    """Write manifest.json atomically, last of all, and return the identity of the store.

    revisions: commits of the data sets that text came from, a note for people: the identity names tokens, not places. code: digests
    of users' filters, transforms and readers, by source and name; they are part of the identity.
    ValueError for more parts than a reader takes.
    """
    identity = identify_store(tokenizer, layout, sources, code)
    has_spans = any(part.num_spans for by_split in sources.values() for parts in by_split.values() for part in parts)
    manifest: dict[str, Any] = {
        "format": "amfm token store",
        "version": LOSS_SPANS_VERSION if has_spans else FORMAT_VERSION,
        "identity": identity,
        "tokenizer": asdict(tokenizer),
        "layout": asdict(layout),
        "sources": {
            name: {split: [part.as_json() for part in sources[name][split]] for split in SPLITS}
            for name in sorted(sources)
        },
    }
    if code:
        manifest["code"] = code
    if revisions:
        manifest["revisions"] = dict(sorted(revisions.items()))
    content = json.dumps(manifest, indent=1).encode()
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(
            f"the manifest of {store} would have {len(content):,} bytes, more than the {MAX_JSON_BYTES:,} that are read; "
            "prepare with a larger data.prepare.part_bytes, so that there are fewer parts"
        )
    if not (store / MANIFEST).is_file() or (store / MANIFEST).read_bytes() != content:
        write_file_atomically(store / MANIFEST, content)
    return identity


def identify_source(name: str, split: Split, parts: Sequence[Part]) -> str:
    """Digest of a source's parts in one split, in their order."""
    digest = hashlib.blake2b(f"{name}\n{split}\n".encode(), digest_size=16)
    for part in parts:
        digest.update(f"{part.path} {part.num_tokens} {part.num_documents} {part.digest}\n".encode())
    return digest.hexdigest()


def identify_store(
    tokenizer: TokenizerRecord, layout: Layout, sources: PartsBySource, code: Mapping[str, Any] = {}
) -> str:
    """Digest of everything that a manifest says."""
    facts = [FORMAT_VERSION, asdict(tokenizer), asdict(layout)]
    facts += [identify_source(name, split, sources[name][split]) for name in sorted(sources) for split in SPLITS]
    facts += [dict(code)] if code else []
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()
