"""Read a token store: verified Zarr v3 parts and one manifest, in a folder or at a URL.

A part is a Zarr array of tokens in shards of small chunks, each with its crc32c, and the ends of its documents. The
manifest names parts, sizes, digests and the tokenizer. A row needs one or two chunks: they are found in a shard's index,
read by their byte range, checked and decoded here, without Zarr, which would cost more than the read. What fails a check
raises DamagedError. Behind a URL the same byte ranges are requested, through a cache on the node's disk.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from amfm.data_pipeline.durable.files import digest_files, digest_folder
from amfm.data_pipeline.durable.json_files import inside, parse_object, read_bounded, understood
from amfm.data_pipeline.memory import no_garbage_collection
from amfm.data_pipeline.store.manifest import (
    DOCUMENT_CHUNK,
    FORMAT_VERSION,
    LOSS_SPANS_VERSION,
    MANIFEST,
    MAX_SHARD_TOKENS,
    SPLITS,
    Layout,
    Part,
    PartsBySource,
    Split,
    TokenizerRecord,
    digest_opening,
    identify_source,
    identify_store,
    shard_length,
)
from amfm.data_pipeline.store.node_cache import CachedFiles, CacheSettings, keep_small_files
from amfm.data_pipeline.store.object_store import RemoteFolder, is_url
from amfm.data_pipeline.store.shards import DamagedError, ShardedArray

MAX_OPEN_PARTS = 256  # some 50 MB of indexes and document ends; a part that is not open costs several rows
DEFAULT_CACHE = CacheSettings(folder="~/.cache/amfm", max_bytes=64 * 10**9, block_bytes=4 * 2**20)


class _OpenPart(NamedTuple):
    """A part that is open: its tokens, and in memory its document ends and loss spans."""

    tokens: ShardedArray
    ends: npt.NDArray[np.int64]
    spans: npt.NDArray[np.int64] | None


class TokenStore:
    """A prepared store, open for reading. No threads, nothing shared between processes; pickles to its location.

    location: as given, a folder or a URL. path: the folder; for a URL one in the node cache, where the manifest, the
    tokenizer and what is derived from the parts are. At most 256 parts are open at a time; each keeps its shard index
    and document ends in memory.
    """

    def __init__(
        self,
        path: Path,
        identity: str,
        tokenizer: TokenizerRecord,
        layout: Layout,
        sources: PartsBySource,
        cached: CachedFiles | None = None,
        revisions: Mapping[str, str] = {},
    ) -> None:
        self.path, self.tokenizer, self.layout = path, tokenizer, layout
        self.revisions = dict(revisions)  # commits of the Hub's data sets that the text came from, by their names
        self.location = str(path) if cached is None else cached.remote.url
        self._cached, self._identity, self._sources = cached, identity, sources
        self._source_identities: dict[tuple[str, Split], str] = {}
        self._open_parts: OrderedDict[str, _OpenPart] = OrderedDict()

    @classmethod
    def open(cls, path: str | Path, cache: CacheSettings = DEFAULT_CACHE) -> TokenStore:
        """Read the manifest of a store in a folder or at a URL; parts are opened when they are read.

        ValueError when it is not a prepared store or has a newer format; DamagedError when the manifest does not match
        its own identity; RuntimeError when an object store cannot be reached.
        """
        remote = RemoteFolder(str(path)) if is_url(str(path)) else None
        file = f"{path}/{MANIFEST}"
        try:
            content = read_bounded(Path(file)) if remote is None else remote.read(MANIFEST)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(
                f"data.store={str(path)!r} must hold a prepared store; run `amfm prepare CONFIG` first"
            ) from error
        with no_garbage_collection():
            return cls._from_manifest(path, remote, file, content, cache)

    @classmethod
    def _from_manifest(
        cls, path: str | Path, remote: RemoteFolder | None, file: str, content: bytes, cache: CacheSettings
    ) -> TokenStore:
        """Build the store from the bytes of its manifest, checked against the identity that they state."""

        def damaged(text: str) -> DamagedError:
            return DamagedError(f"{text}; run `amfm prepare CONFIG` to write it again")

        manifest = parse_object(content, file, damaged)
        if manifest.get("version") not in (FORMAT_VERSION, LOSS_SPANS_VERSION):
            raise ValueError(
                f"{file} has format version {manifest.get('version')}, this program reads {FORMAT_VERSION} and {LOSS_SPANS_VERSION}; "
                "prepare the store again or use the matching release"
            )
        with understood(file, damaged):
            tokenizer = TokenizerRecord(**manifest["tokenizer"])
            inside(Path(str(path)), tokenizer.file, damaged)
            layout = Layout(**manifest["layout"])
            sources: dict[str, dict[Split, Sequence[Part]]] = {
                name: {split: tuple(map(Part.from_json, by_split[split])) for split in SPLITS}
                for name, by_split in manifest["sources"].items()
            }
            revisions = dict(manifest.get("revisions", {}))
            identity, stated = (
                identify_store(tokenizer, layout, sources, manifest.get("code") or {}),
                manifest["identity"],
            )
        if identity != stated:
            raise damaged(
                f"{file} states identity {stated}, but its contents have {identity}: it was edited or damaged"
            )
        if remote is None:
            return cls(Path(path), identity, tokenizer, layout, sources, revisions=revisions)
        mirror = keep_small_files(remote, identity, {MANIFEST: content, tokenizer.file: None}, cache)
        return cls(mirror, identity, tokenizer, layout, sources, CachedFiles(remote, cache), revisions)

    def __reduce__(self) -> tuple[Any, ...]:
        cache = DEFAULT_CACHE if self._cached is None else self._cached.cache.settings
        return _reopen, (self.location, self._identity, cache)

    def bytes_per_token(self, source: str, split: Split) -> float | None:
        """UTF-8 bytes of text that a token of a source stands for on average.

        None if the text is not known, and where only some of the tokens are learned.
        """
        parts = [part for part in self.parts(source, split) if not part.num_spans]
        num_bytes, num_tokens = (sum(getattr(part, name) for part in parts) for name in ("text_bytes", "num_tokens"))
        return num_bytes / num_tokens if num_bytes else None

    def with_own_files(self) -> TokenStore:
        """Copy the store for another thread: the same parts, no open file in common."""
        cached = None if self._cached is None else CachedFiles(self._cached.remote, self._cached.cache.settings)
        return TokenStore(self.path, self._identity, self.tokenizer, self.layout, self._sources, cached, self.revisions)

    def identity(self) -> str:
        """Return the digest over tokenizer, layout and every part: two stores with equal identity hold equal tokens."""
        return self._identity

    @property
    def tokenizer_identity(self) -> str:
        """Content hash of the tokenizer that made the tokens."""
        return self.tokenizer.identity

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id that can occur."""
        return self.tokenizer.vocab_size

    @property
    def eos_id(self) -> int:
        """Token that ends every document."""
        return self.tokenizer.eos_id

    @property
    def tokenizer_path(self) -> Path:
        """File of the tokenizer inside the store."""
        return self.path / self.tokenizer.file

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources, sorted."""
        return tuple(sorted(self._sources))

    def parts(self, source: str, split: Split) -> Sequence[Part]:
        """Parts of a source in order; ValueError for a source that the store does not have."""
        if source not in self._sources:
            raise ValueError(
                f"source {source!r} must be one of the store's {', '.join(self.source_names)}; "
                "run `amfm prepare CONFIG` after adding a source"
            )
        return self._sources[source][split]

    def source_identity(self, source: str, split: Split) -> str:
        """Digest of only one source: unchanged when other sources are added."""
        if (source, split) not in self._source_identities:
            self._source_identities[source, split] = identify_source(source, split, self.parts(source, split))
        return self._source_identities[source, split]

    def num_tokens(self, source: str, split: Split) -> int:
        """Tokens of a source, ends of documents included."""
        return sum(part.num_tokens for part in self.parts(source, split))

    def all_parts(self) -> Iterator[tuple[str, Split, Part]]:
        """Every part with its source and split."""
        for source in self.source_names:
            for split in SPLITS:
                for part in self._sources[source][split]:
                    yield source, split, part

    def read_tokens(self, part: Part, start: int, stop: int) -> npt.NDArray[np.generic]:
        """Tokens [start, stop) of a part in the store's dtype, every chunk verified; DamagedError otherwise."""
        if self._cached is None:
            return self._open_part(part).tokens.read(start, stop)
        with self._forgetting_damage(part):
            return self._open_part(part).tokens.read(start, stop)

    def document_ends(self, part: Part) -> npt.NDArray[np.int64]:
        """Offset after each document of a part, int64 [documents], kept while the part is open."""
        return self._open_part(part).ends

    def loss_spans(self, part: Part) -> npt.NDArray[np.int64] | None:
        """First and stop of each run of tokens that are learned, int64 [2 x runs]; None where all of the part is."""
        return self._open_part(part).spans

    def chunk_heads(self, part: Part) -> npt.NDArray[np.generic]:
        """First token of each chunk of a part, in the store's dtype: a row that ends with one reads no further."""
        heads = self._open_part(part).tokens.heads
        assert heads is not None, "a part is opened with its chunk heads"
        return heads

    @property
    def remote_cache(self) -> CacheSettings | None:
        """Settings of the node cache of a store at a URL; None for a store in a folder."""
        return None if self._cached is None else self._cached.cache.settings

    def check_files(self) -> Iterator[Part]:
        """Compare the size of every shard file, part by part: DamagedError for a missing file or another size.

        A folder is asked for each file, a URL for a listing. The caller decides how many parts to check at a time: 100,000
        take half a second, and on a busy network minutes.
        """
        listed = self.list_files()
        for _, _, part in self.all_parts():
            check_part_files(self.location, part, listed)
            yield part

    def list_files(self) -> dict[str, int] | None:
        """List bytes by path of all that is at the URL of a store; None for a folder, which answers for each file."""
        if self._cached is None:
            return None
        return {item.name: item.num_bytes for item in self._cached.remote.list()}

    def digest_part(self, part: Part) -> str:
        """BLAKE3 of the files of a part as they are now; the whole part is read, past the node cache."""
        if self._cached is None:
            return digest_folder(self.path / part.path)
        remote = RemoteFolder(f"{self.location}/{part.path}")
        return digest_files((name, remote.read(name)) for name in sorted(item.name for item in remote.list()))

    def close(self) -> None:
        """Close all files; reading opens them again."""
        for opened in self._open_parts.values():
            opened.tokens.close()
        self._open_parts.clear()
        if self._cached is not None:
            self._cached.cache.close()

    def _open_part(self, part: Part) -> _OpenPart:
        """Open a part, or find it open; the least recently used closes."""
        if part.path in self._open_parts:
            self._open_parts.move_to_end(part.path)
            return self._open_parts[part.path]
        folder, layout = f"{self.location}/{part.path}", self.layout
        if self._cached is None:
            check_part_files(self.location, part)
        else:
            for path, size in _shard_files(part):
                self._cached.expect(f"{self.location}/{path}", size, part.digest)
        tokens = self._array(f"{folder}/tokens", layout.dtype, part.num_tokens, layout.chunk_tokens)
        ends_array = self._array(f"{folder}/document_ends", "uint64", part.num_documents, DOCUMENT_CHUNK)
        num_chunks = -(-part.num_tokens // layout.chunk_tokens)
        heads_array = self._array(f"{folder}/chunk_heads", layout.dtype, num_chunks, DOCUMENT_CHUNK)
        with self._forgetting_damage(part):
            values, tokens.heads = ends_array.read_all(), heads_array.read_all()
            spans = self._read_spans(folder, part) if part.num_spans else None
            _check_opening(folder, part, values, tokens.heads, spans)
        ends_array.close()
        heads_array.close()
        # Searching uint64 for an int would convert all of it each time.
        opened = _OpenPart(tokens, values.astype(np.int64), None if spans is None else spans.astype(np.int64))
        self._open_parts[part.path] = opened
        if len(self._open_parts) > MAX_OPEN_PARTS:
            self._open_parts.popitem(last=False)[1].tokens.close()
        return opened

    def _read_spans(self, folder: str, part: Part) -> npt.NDArray[Any]:
        """Read the edges of the runs of tokens that are learned."""
        array = self._array(f"{folder}/loss_spans", "uint64", 2 * part.num_spans, DOCUMENT_CHUNK)
        spans = array.read_all()
        array.close()
        return spans

    def _array(self, path: str, dtype: str, length: int, chunk: int) -> ShardedArray:
        shard = shard_length(length, chunk, MAX_SHARD_TOKENS)
        codec = self.layout.compression
        return ShardedArray(path, dtype, length, chunk=chunk, shard=shard, compression=codec, files=self._cached)

    @contextmanager
    def _forgetting_damage(self, part: Part) -> Iterator[None]:
        """A damaged block must not stay in the node cache: the object may be restored."""
        try:
            yield
        except DamagedError:
            if self._cached is not None:
                self._cached.forget([f"{self.location}/{path}" for path, _ in _shard_files(part)])
            raise


def _reopen(path: str, identity: str, cache: CacheSettings) -> TokenStore:
    """Open a pickled store in another process; DamagedError if another one is there by now."""
    store = TokenStore.open(path, cache)
    if store.identity() != identity:
        raise DamagedError(
            f"the store {path} changed while it was in use: identity {identity} became {store.identity()}"
        )
    return store


def _shard_files(part: Part) -> Iterator[tuple[str, int]]:
    """Iterate over the shard files of a part: path in the store, bytes as the manifest says."""
    for name, sizes in (
        ("tokens", part.token_shards),
        ("document_ends", part.document_shards),
        ("chunk_heads", part.head_shards),
        ("loss_spans", part.span_shards),
    ):
        for number, size in enumerate(sizes):
            yield f"{part.path}/{name}/c/{number}", size


def _check_opening(
    folder: str, part: Part, ends: npt.NDArray[Any], heads: npt.NDArray[np.generic], spans: npt.NDArray[Any] | None
) -> None:
    """Raise DamagedError where document ends, chunk heads and loss spans are not those of the part that the manifest names."""
    if len(ends) == 0 or int(ends[-1]) != part.num_tokens:
        raise DamagedError(f"{folder} is damaged: its documents do not end at its {part.num_tokens} tokens")
    if part.opening_digest and digest_opening(ends, heads, spans) != part.opening_digest:
        raise DamagedError(
            f"{folder} is not the part that the manifest names: it is of another store, or was prepared again under this "
            "run; restore it from a copy, or run `amfm prepare CONFIG` to write it again"
        )


def check_part_files(store: Path | str, part: Part, listed: Mapping[str, int] | None = None) -> None:
    """Compare the shard files of a part with the sizes in the manifest; DamagedError names the file.

    listed: size by path of what an object store holds; None: the folder is asked.
    """
    for path, size in _shard_files(part):
        file = f"{store}/{path}"  # joined as text: a large store has 100,000 of these, and Path takes 20 times longer
        try:
            found = os.stat(file).st_size if listed is None else listed[path]
        except (FileNotFoundError, KeyError) as error:
            raise DamagedError(
                f"{file} is missing; run `amfm prepare CONFIG` to write the part again, or restore it from a copy"
            ) from error
        if found != size:
            raise DamagedError(
                f"{file} has {found} bytes, the manifest states {size}; delete {store}/{part.path} and run "
                "`amfm prepare CONFIG` to write the part again, or restore it from a copy"
            )
