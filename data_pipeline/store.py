"""The token store: verified Zarr v3 parts and one manifest. Writing goes through zarr-python, reading through pread."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from data_pipeline.shards import Compression, DamagedError, ShardedArray, encode_shard, iterate_shards

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MAX_SHARD_TOKENS = 64 * 2**20
DOCUMENT_CHUNK = 8192
MAX_OPEN_PARTS = 64

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
        """uint16 where every id fits, else uint32; a larger vocabulary is a ValueError."""
        if vocab_size > 2**32:
            raise ValueError(f"tokenizer vocabulary {vocab_size} must be at most {2**32}, what uint32 tokens can hold")
        return Layout("uint16" if vocab_size <= 2**16 else "uint32", chunk_tokens, preset)

    @property
    def compression(self) -> Compression:
        """Codec of the preset."""
        return COMPRESSION_BY_PRESET[self.preset]


@dataclass(frozen=True, slots=True)
class Part:
    """One part as the manifest records it.

    path: relative to the store. token_shards, document_shards: bytes of each shard file. digest: blake2b-256 of all
    files of the part, names included.
    """

    path: str
    num_tokens: int
    num_documents: int
    text_bytes: int
    token_shards: tuple[int, ...]
    document_shards: tuple[int, ...]
    digest: str

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Part:
        """Inverse of dataclasses.asdict after JSON."""
        return Part(
            record["path"],
            record["num_tokens"],
            record["num_documents"],
            record["text_bytes"],
            tuple(record["token_shards"]),
            tuple(record["document_shards"]),
            record["digest"],
        )


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


def _shard_length(length: int, chunk: int, limit: int) -> int:
    """One shard for the whole array up to the limit; at least one chunk, a multiple of the chunk."""
    limit = max(chunk, limit // chunk * chunk)
    return min(limit, max(chunk, -(-length // chunk) * chunk))


def write_part(
    store: Path,
    relative: str,
    tokens: npt.NDArray[np.generic],
    document_ends: npt.NDArray[np.uint64],
    *,
    text_bytes: int,
    layout: Layout,
    attributes: Mapping[str, Any],
) -> Part:
    """Write one part under a temporary name, make it durable, rename it into place and return its record.

    tokens: [N] of layout.dtype. document_ends: [documents] offset after each document, end token included.
    A part of that name from an earlier attempt is replaced. The bytes depend on the arguments alone. One writer a
    part; OSError of the disk passes through, with the temporary folder removed.
    """
    assert str(tokens.dtype) == layout.dtype, f"tokens are {tokens.dtype}, the store has {layout.dtype}"
    final = store / relative
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.parent / f".writing-{final.name}-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        _create_arrays(temporary, len(tokens), len(document_ends), layout, attributes)
        chunk, codec = layout.chunk_tokens, layout.compression
        token_shards = _write_shards(temporary / "tokens", tokens, chunk, MAX_SHARD_TOKENS, codec)
        ends_shards = _write_shards(temporary / "document_ends", document_ends, DOCUMENT_CHUNK, MAX_SHARD_TOKENS, codec)
        digest = digest_folder(temporary, durable=True)
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
        sync_folder(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Part(relative, len(tokens), len(document_ends), text_bytes, token_shards, ends_shards, digest)


def _create_arrays(
    folder: Path, num_tokens: int, num_documents: int, layout: Layout, attributes: Mapping[str, Any]
) -> None:
    """Let zarr-python write the metadata, so that any Zarr v3 reader opens the part."""
    import zarr  # here, because training only reads and zarr takes most of a second to import
    from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

    def codecs(item_bytes: int) -> list[Any]:
        if layout.compression == "lz4hc":
            # Shuffling the bytes of token ids makes them larger: their low bytes carry no pattern.
            blosc = BloscCodec(cname="lz4hc", clevel=5, shuffle="noshuffle", typesize=item_bytes)
            return [blosc, Crc32cCodec()]
        return [ZstdCodec(level=3), Crc32cCodec()] if layout.compression == "zstd" else [Crc32cCodec()]

    group = zarr.create_group(store=str(folder), zarr_format=3, attributes=dict(attributes))
    for name, length, dtype, chunk in (
        ("tokens", num_tokens, layout.dtype, layout.chunk_tokens),
        ("document_ends", num_documents, "uint64", DOCUMENT_CHUNK),
    ):
        group.create_array(
            name,
            shape=(length,),
            dtype=dtype,
            chunks=(chunk,),
            shards=(_shard_length(length, chunk, MAX_SHARD_TOKENS),),
            compressors=codecs(np.dtype(dtype).itemsize),
            fill_value=0,
        )


def _write_shards(
    array: Path, values: npt.NDArray[np.generic], chunk: int, limit: int, compression: Compression
) -> tuple[int, ...]:
    # Encoded here and not by zarr-python: the same bytes at 3 to 10 times the speed.
    shard = _shard_length(len(values), chunk, limit)
    sizes = []
    for number, piece in iterate_shards(values, shard):
        encoded = encode_shard(piece, chunk, shard, compression)
        (array / "c").mkdir(exist_ok=True)
        (array / "c" / str(number)).write_bytes(encoded)
        sizes.append(len(encoded))
    return tuple(sizes)


def digest_folder(folder: Path, *, durable: bool = False) -> str:
    """blake2b-256 over the names and contents of all files below a folder; durable also fsyncs them."""
    digest = hashlib.blake2b(digest_size=32)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            content = file.read()
            if durable:
                os.fsync(file.fileno())
        name = path.relative_to(folder).as_posix().encode()
        for piece in (len(name).to_bytes(8, "little"), name, len(content).to_bytes(8, "little"), content):
            digest.update(piece)
    if durable:
        for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
            sync_folder(path)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file_atomically(path: Path, content: bytes) -> None:
    """Replace a file so that a reader, or a crash, sees the old content or the new one and nothing between."""
    temporary = path.with_name(f".writing-{path.name}-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


PartsBySource = Mapping[str, Mapping[Split, Sequence[Part]]]


def write_manifest(store: Path, tokenizer: TokenizerRecord, layout: Layout, sources: PartsBySource) -> str:
    """Write manifest.json atomically, last of all, and return the identity of the store."""
    identity = _identify_store(tokenizer, layout, sources)
    manifest = {
        "format": "amfm token store",
        "version": FORMAT_VERSION,
        "identity": identity,
        "tokenizer": asdict(tokenizer),
        "layout": asdict(layout),
        "sources": {
            name: {split: [asdict(part) for part in sources[name][split]] for split in SPLITS}
            for name in sorted(sources)
        },
    }
    content = json.dumps(manifest, indent=1).encode()
    if not (store / MANIFEST).is_file() or (store / MANIFEST).read_bytes() != content:
        write_file_atomically(store / MANIFEST, content)
    return identity


def _identify_source(name: str, split: Split, parts: Sequence[Part]) -> str:
    digest = hashlib.blake2b(f"{name}\n{split}\n".encode(), digest_size=16)
    for part in parts:
        digest.update(f"{part.path} {part.num_tokens} {part.num_documents} {part.digest}\n".encode())
    return digest.hexdigest()


def _identify_store(tokenizer: TokenizerRecord, layout: Layout, sources: PartsBySource) -> str:
    facts = [FORMAT_VERSION, asdict(tokenizer), asdict(layout)]
    facts += [_identify_source(name, split, sources[name][split]) for name in sorted(sources) for split in SPLITS]
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


class TokenStore:
    """A prepared store, open for reading. No threads, nothing shared between processes; pickles to its path.

    At most 64 parts are open at a time; each keeps its shard index and document ends in memory.
    """

    def __init__(
        self, path: Path, identity: str, tokenizer: TokenizerRecord, layout: Layout, sources: PartsBySource
    ) -> None:
        self.path, self.tokenizer, self.layout = path, tokenizer, layout
        self._identity, self._sources = identity, sources
        self._open_parts: OrderedDict[str, tuple[ShardedArray, npt.NDArray[np.int64]]] = OrderedDict()

    @classmethod
    def open(cls, path: str | Path) -> TokenStore:
        """Read the manifest of a store; parts are opened when they are read.

        ValueError when the folder isn't a prepared store or has a newer format; DamagedError when the manifest
        doesn't match its own identity.
        """
        folder = Path(path)
        file = folder / MANIFEST
        if not file.is_file():
            raise ValueError(f"data.store={str(path)!r} must hold a prepared store; run `amfm prepare CONFIG` first")
        try:
            manifest = json.loads(file.read_bytes())
        except ValueError as error:
            raise DamagedError(f"{file} is damaged: {error}; run `amfm prepare CONFIG` to write it again") from error
        if manifest.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"{file} has format version {manifest.get('version')}, this program reads {FORMAT_VERSION}; "
                "prepare the store again or use the matching release"
            )
        tokenizer = TokenizerRecord(**manifest["tokenizer"])
        layout = Layout(**manifest["layout"])
        sources: dict[str, dict[Split, Sequence[Part]]] = {
            name: {split: tuple(map(Part.from_json, by_split[split])) for split in SPLITS}
            for name, by_split in manifest["sources"].items()
        }
        identity = _identify_store(tokenizer, layout, sources)
        if identity != manifest["identity"]:
            raise DamagedError(
                f"{file} says identity {manifest['identity']}, but its contents give {identity}: it was edited or "
                "damaged; run `amfm prepare CONFIG` to write it again"
            )
        return cls(folder, identity, tokenizer, layout, sources)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.path), self._identity)

    def identity(self) -> str:
        """Digest over the tokenizer, the layout and every part: two stores with equal identity hold equal tokens."""
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
        """Parts of a source in order; ValueError for a source that the store doesn't have."""
        if source not in self._sources:
            raise ValueError(
                f"source {source!r} must be one of the store's {', '.join(self.source_names)}; "
                "run `amfm prepare CONFIG` after adding a source"
            )
        return self._sources[source][split]

    def source_identity(self, source: str, split: Split) -> str:
        """Digest of one source alone: unchanged when other sources are added."""
        return _identify_source(source, split, self.parts(source, split))

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
        return self._open_part(part)[0].read(start, stop)

    def document_ends(self, part: Part) -> npt.NDArray[np.int64]:
        """Offset after each document of a part, int64 [documents], kept while the part is open."""
        return self._open_part(part)[1]

    def check_files(self) -> None:
        """Stat every shard file: DamagedError for the first part with a missing file or another size."""
        for _, _, part in self.all_parts():
            check_part_files(self.path, part)

    def close(self) -> None:
        """Close all files; reading opens them again."""
        for tokens, _ in self._open_parts.values():
            tokens.close()
        self._open_parts.clear()

    def _open_part(self, part: Part) -> tuple[ShardedArray, npt.NDArray[np.int64]]:
        if part.path in self._open_parts:
            self._open_parts.move_to_end(part.path)
            return self._open_parts[part.path]
        check_part_files(self.path, part)
        folder, layout = self.path / part.path, self.layout
        tokens = self._array(folder / "tokens", layout.dtype, part.num_tokens, layout.chunk_tokens)
        ends_array = self._array(folder / "document_ends", "uint64", part.num_documents, DOCUMENT_CHUNK)
        ends = ends_array.read_all().astype(np.int64)  # searching uint64 for an int would convert all of it each time
        ends_array.close()
        if len(ends) == 0 or int(ends[-1]) != part.num_tokens:
            raise DamagedError(f"{folder} is damaged: its documents don't end at its {part.num_tokens} tokens")
        self._open_parts[part.path] = tokens, ends
        if len(self._open_parts) > MAX_OPEN_PARTS:
            self._open_parts.popitem(last=False)[1][0].close()
        return tokens, ends

    def _array(self, path: Path, dtype: str, length: int, chunk: int) -> ShardedArray:
        shard = _shard_length(length, chunk, MAX_SHARD_TOKENS)
        return ShardedArray(path, dtype, length, chunk=chunk, shard=shard, compression=self.layout.compression)


def _reopen(path: str, identity: str) -> TokenStore:
    store = TokenStore.open(path)
    if store.identity() != identity:
        raise DamagedError(
            f"the store {path} changed while it was in use: identity {identity} became {store.identity()}"
        )
    return store


def check_part_files(store: Path, part: Part) -> None:
    """Compare the shard files of a part with the sizes in the manifest; DamagedError names the file."""
    folder = (
        f"{store}/{part.path}"  # joined as text: a large store has 100,000 of these, and Path takes 20 times longer
    )
    for name, sizes in (("tokens", part.token_shards), ("document_ends", part.document_shards)):
        for number, size in enumerate(sizes):
            file = f"{folder}/{name}/c/{number}"
            try:
                found = os.stat(file).st_size
            except FileNotFoundError as error:
                raise DamagedError(
                    f"{file} is missing; run `amfm prepare CONFIG` to write the part again, or restore it from a copy"
                ) from error
            if found != size:
                raise DamagedError(
                    f"{file} has {found} bytes, the manifest says {size}; delete {folder} and run "
                    "`amfm prepare CONFIG` to write the part again"
                )
