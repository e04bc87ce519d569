"""Write one part: metadata through zarr-python, so that any Zarr v3 reader opens it, and the shards by our own encoder.

A part is a Zarr group of three arrays: tokens, the offset after each document, and the first token of each chunk (a row
needs one token more than its length, which is often the first of a chunk that it would else have to read); and a fourth where
only some of the tokens are learned: the edges of their runs. All files are
made in memory first: so the digest comes from the bytes that are written, and the folder is written and synced at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from amfm.data_pipeline.durable.files import (
    UNFINISHED,
    delete,
    digest_files,
    make_folders,
    sync,
    try_to_delete,
    write_tree,
)
from amfm.data_pipeline.store.manifest import (
    DOCUMENT_CHUNK,
    MAX_SHARD_TOKENS,
    PART_NAME,
    Layout,
    Part,
    digest_opening,
    shard_length,
)
from amfm.data_pipeline.store.shards import Compression, encode_shard


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
    loss_spans: npt.NDArray[np.uint64] | None = None,
) -> Part:
    """Write one part under a temporary name, make it durable, rename it into place and return its record.

    tokens: [N] of layout.dtype. document_ends: [documents] offset after each document, end token included.
    loss_spans: first and stop of each run of tokens that are learned; None: all are.
    A part of that name from an earlier attempt is replaced. The bytes depend only on the arguments. One writer a
    part; OSError of the disk passes through, with the temporary folder removed.
    """
    assert str(tokens.dtype) == layout.dtype, f"tokens are {tokens.dtype}, the store has {layout.dtype}"
    final = store / relative
    make_folders(final.parent)
    temporary = final.parent / f".writing-{final.name}-{os.getpid()}-{os.urandom(4).hex()}"
    arrays = {"tokens": tokens, "document_ends": document_ends, "chunk_heads": tokens[:: layout.chunk_tokens]}
    if loss_spans is not None:
        arrays["loss_spans"] = loss_spans
    try:
        files = _metadata_files(layout, {name: len(values) for name, values in arrays.items()}, attributes)
        sizes = {}
        for name, _, chunk in _declare_arrays(layout, has_spans=loss_spans is not None):
            shards = _encode_shards(arrays[name], chunk, layout.compression)
            files |= {f"{name}/c/{number}": content for number, content in enumerate(shards)}
            sizes[name] = tuple(map(len, shards))
        write_tree(temporary, files)
        if os.path.lexists(final):
            delete(final, PART_NAME)
        os.rename(temporary, final)
        sync(final.parent)
    finally:
        try_to_delete(temporary, UNFINISHED)
    return Part(
        relative,
        len(tokens),
        len(document_ends),
        text_bytes,
        token_shards=sizes["tokens"],
        document_shards=sizes["document_ends"],
        head_shards=sizes["chunk_heads"],
        digest=digest_files(sorted(files.items())),
        opening_digest=digest_opening(document_ends, arrays["chunk_heads"], loss_spans),
        num_spans=len(arrays.get("loss_spans", ())) // 2,
        span_shards=sizes.get("loss_spans", ()),
    )


def _declare_arrays(layout: Layout, *, has_spans: bool) -> tuple[tuple[str, str, int], ...]:
    """(name, dtype, values per chunk) of the arrays of a part."""
    return (
        ("tokens", layout.dtype, layout.chunk_tokens),
        ("document_ends", "uint64", DOCUMENT_CHUNK),
        ("chunk_heads", layout.dtype, DOCUMENT_CHUNK),
        *((("loss_spans", "uint64", DOCUMENT_CHUNK),) if has_spans else ()),
    )


def _metadata_files(layout: Layout, lengths: Mapping[str, int], attributes: Mapping[str, Any]) -> dict[str, bytes]:
    """Content of each zarr.json of a part."""
    files = {}
    # Of a template only the length and the shard size change; the chunk inside the sharding codec stays.
    for file, template in _metadata_templates(layout, has_spans="loss_spans" in lengths).items():
        name = file.rpartition("/")[0]
        metadata: dict[str, Any] = template | {"attributes": dict(attributes)}
        if name:
            (chunk,) = template["chunk_grid"]["configuration"]["chunk_shape"]
            shard = shard_length(lengths[name], chunk, MAX_SHARD_TOKENS)
            grid = {"name": "regular", "configuration": {"chunk_shape": [shard]}}
            metadata = template | {"shape": [lengths[name]], "chunk_grid": grid}
        files[file] = json.dumps(metadata, indent=2).encode()
    return files


@cache
def _metadata_templates(layout: Layout, *, has_spans: bool) -> dict[str, dict[str, Any]]:
    """What zarr-python writes for a part with arrays of one chunk, by file, so that any Zarr v3 reader opens the part.

    Parts differ only in lengths and attributes; to ask zarr-python for each takes as long as to encode its tokens.
    """
    import zarr  # here, because training only reads and zarr takes most of a second to import
    from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

    def codecs(item_bytes: int) -> list[Any]:
        if layout.compression == "lz4hc":
            # Shuffling the bytes of token ids makes them larger: their low bytes carry no pattern.
            blosc = BloscCodec(cname="lz4hc", clevel=5, shuffle="noshuffle", typesize=item_bytes)
            return [blosc, Crc32cCodec()]
        return [ZstdCodec(level=3), Crc32cCodec()] if layout.compression == "zstd" else [Crc32cCodec()]

    files: dict[str, Any] = {}
    group = zarr.create_group(store=files, zarr_format=3)
    for name, dtype, chunk in _declare_arrays(layout, has_spans=has_spans):
        group.create_array(
            name,
            shape=(chunk,),
            dtype=dtype,
            chunks=(chunk,),
            shards=(chunk,),
            compressors=codecs(np.dtype(dtype).itemsize),
            fill_value=0,
        )
    return {file: json.loads(content.to_bytes()) for file, content in files.items()}


def _encode_shards(values: npt.NDArray[np.generic], chunk: int, compression: Compression) -> list[bytes]:
    """Encode an array as the contents of its shard files, in order."""
    # Encoded here and not by zarr-python: the same bytes at 3 to 10 times the speed.
    shard = shard_length(len(values), chunk, MAX_SHARD_TOKENS)
    # The last shard holds fewer values, but has an index of full length, as zarr asks.
    return [
        encode_shard(values[start : start + shard], chunk, shard, compression) for start in range(0, len(values), shard)
    ]
