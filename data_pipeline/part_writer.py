"""Write one part: metadata through zarr-python, so that any Zarr v3 reader opens it, and the shards by our own encoder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.files import digest_folder, sync_folder
from data_pipeline.shards import Compression, encode_shard, iterate_shards
from data_pipeline.store import DOCUMENT_CHUNK, MAX_SHARD_TOKENS, Layout, Part, shard_length


def import_zarr() -> None:
    """Import zarr-python before the first part needs it: it takes as long as tokenizing a megabyte or two."""
    import zarr.codecs  # noqa: F401


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
        heads = tokens[:: layout.chunk_tokens]
        heads_shards = _write_shards(temporary / "chunk_heads", heads, DOCUMENT_CHUNK, MAX_SHARD_TOKENS, codec)
        digest = digest_folder(temporary, durable=True)
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
        sync_folder(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Part(relative, len(tokens), len(document_ends), text_bytes, token_shards, ends_shards, heads_shards, digest)


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
        ("chunk_heads", -(-num_tokens // layout.chunk_tokens), layout.dtype, DOCUMENT_CHUNK),
    ):
        group.create_array(
            name,
            shape=(length,),
            dtype=dtype,
            chunks=(chunk,),
            shards=(shard_length(length, chunk, MAX_SHARD_TOKENS),),
            compressors=codecs(np.dtype(dtype).itemsize),
            fill_value=0,
        )


def _write_shards(
    array: Path, values: npt.NDArray[np.generic], chunk: int, limit: int, compression: Compression
) -> tuple[int, ...]:
    # Encoded here and not by zarr-python: the same bytes at 3 to 10 times the speed.
    shard = shard_length(len(values), chunk, limit)
    sizes = []
    for number, piece in iterate_shards(values, shard):
        encoded = encode_shard(piece, chunk, shard, compression)
        (array / "c").mkdir(exist_ok=True)
        (array / "c" / str(number)).write_bytes(encoded)
        sizes.append(len(encoded))
    return tuple(sizes)
