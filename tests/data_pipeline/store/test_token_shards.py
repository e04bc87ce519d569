"""Shards of MosaicML Streaming and litdata, and Megatron's pairs on an object store, become documents; damage is named.

The files of `token_shards/` were written by mosaicml-streaming 0.13.0 and litdata 0.2.76 (write_token_shards.py).
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from amfm.data_pipeline.config import DataConfig, SourceConfig
from amfm.data_pipeline.prepare.documents import SegmentReader
from amfm.data_pipeline.prepare.prepare import prepare
from amfm.data_pipeline.prepare.records import Document, TokenDocument
from amfm.data_pipeline.prepare.segments import cut_segments
from amfm.data_pipeline.prepare.sources import list_files
from amfm.data_pipeline.store.mds_files import DamagedShardError, read_mds_shard
from amfm.data_pipeline.store.megatron_files import CODE_BY_DTYPE, HEADER, MAGIC
from amfm.data_pipeline.store.store import TokenStore
from amfm.data_pipeline.verify import verify_store
from tests.data_pipeline.store.test_megatron_files import documents_of
from tests.data_pipeline.store.test_token_files import DOCUMENTS, END, store_config
from tests.helpers.s3 import BUCKET, s3_server, upload
from tests.helpers.tiny_store import make_tiny_store, run_in_process

WRITTEN = Path(__file__).with_name("token_shards")
FIXED = [[ids[0], 7, 2] for ids in DOCUMENTS]


def read(path: Path | str, column: str, segment_bytes: int = 10_000) -> list[object]:
    """Documents of a file: ids, text, or the reason of a reject."""
    found: list[object] = []
    for file in list_files(SourceConfig(name="web", paths=(str(path),))):
        for segment in cut_segments(file, segment_bytes):
            for item in SegmentReader(segment, column, None, END):
                if isinstance(item, TokenDocument):
                    found.append(item.tokens.tolist())
                else:
                    found.append(item.text if isinstance(item, Document) else item.reason)
    return found


@pytest.mark.parametrize("name", ["a.mds", "b.mds.zstd"])
@pytest.mark.parametrize("segment_bytes", [1, 300, 10_000])
def test_each_encoding_of_integers_gives_the_ids(name: str, segment_bytes: int) -> None:
    for column, wanted in {"free": DOCUMENTS, "typed": DOCUMENTS, "old": DOCUMENTS, "fixed": FIXED}.items():
        assert read(WRITTEN / name, column, segment_bytes) == wanted
    assert read(WRITTEN / name, "text", segment_bytes) == [f"document é {ids[0]}" for ids in DOCUMENTS]


@pytest.mark.parametrize("segment_bytes", [1, 10, 10_000])
def test_items_of_litdata_are_documents(segment_bytes: int) -> None:
    assert read(WRITTEN / "chunk-0-0.bin", "text", segment_bytes) == DOCUMENTS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return make_tiny_store(tmp_path_factory.mktemp("data"))


def test_a_folder_of_shards_becomes_a_store_that_verifies(tiny: DataConfig, tmp_path: Path) -> None:
    config = store_config(tiny, tmp_path, WRITTEN, text_column="typed")
    prepare(config, runner=run_in_process)
    assert sorted(documents_of(TokenStore.open(config.store), "web", "train")) == sorted(DOCUMENTS * 3)
    assert verify_store(config.store) == []


def test_damaged_shards_and_other_columns_are_named(tiny: DataConfig, tmp_path: Path) -> None:
    content = (WRITTEN / "a.mds").read_bytes()
    (number,) = struct.unpack("<I", content[:4])
    begin = struct.unpack("<I", content[4:8])[0]
    bad = {
        content[:-1]: "its samples must follow one another, up to its end",
        struct.pack("<I", 2**31) + content[4:]: "656 bytes cannot hold its 2147483648 samples",
        content[:20] + b"[" + content[21:]: "what describes its columns cannot be read",
        content.replace(
            b'"column_sizes": [12,', b'"column_sizes": [-2,'
        ): "names, encodings and sizes of its columns do not fit",
        content[:begin] + b"\xff" + content[begin + 1 :]: "the columns of sample 0 have",
        b"": "",
    }
    assert number == 3
    for changed, message in bad.items():
        assert changed != content
        (tmp_path / "a.mds").write_bytes(changed)
        if not changed:
            with pytest.raises(ValueError, match=r"a.mds' is an empty file"):
                read(tmp_path / "a.mds", "free")
            continue
        *_, reason = read(tmp_path / "a.mds", "free")
        assert str(reason).startswith(f"damaged MDS shard: {message}")
    config = store_config(tiny, tmp_path, tmp_path / "a.mds", text_column="free")
    (tmp_path / "a.mds").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"source 'web'.*damaged MDS shard"):
        prepare(config, runner=run_in_process)
    assert read(WRITTEN / "a.mds", "ids") == ["no column 'ids' among fixed, free, old, text, typed"]


def test_a_pickled_column_is_never_opened(tmp_path: Path) -> None:
    columns = json.dumps({"column_names": ["x"], "column_encodings": ["pkl"], "column_sizes": [None]}).encode()
    start = 12 + len(columns)
    (tmp_path / "a.mds").write_bytes(struct.pack("<III", 1, start, start + 8) + columns + struct.pack("<II", 4, 0))
    assert read(tmp_path / "a.mds", "x") == ["column 'x' with encoding 'pkl', and read are str, json, bytes, ndarray"]


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.mds").write_bytes(struct.pack("<III", 1, 2**21, 2**21) + bytes(2**21 - 12))
    with (
        (tmp_path / "a.mds").open("rb") as file,
        pytest.raises(DamagedShardError, match="describe its columns, more than"),
    ):
        read_mds_shard(file, 2**21)


def test_damage_of_litdata_is_named(tmp_path: Path) -> None:
    content, index = (WRITTEN / "chunk-0-0.bin").read_bytes(), json.loads((WRITTEN / "index.json").read_text())
    chunk, described = tmp_path / "chunk-0-0.bin", tmp_path / "index.json"
    chunk.write_bytes(content)
    with pytest.raises(ValueError, match=r"chunk-0-0.bin needs index.json next to it"):
        read(chunk, "text")
    for config, message in (
        ({"data_format": ["pickle"]}, r"states data_format \['pickle'\] and compression None; one array of integers"),
        ({"compression": "zstd"}, "and compression zstd"),
        ({"encryption": "x"}, "encrypted"),
        ({"data_format": ["no_header_numpy:7"]}, "its items are not of 8 bytes per token"),
    ):
        described.write_text(json.dumps({"config": index["config"] | config}))
        with pytest.raises(ValueError, match=message):
            read(chunk, "text")
    described.write_text("{")
    with pytest.raises(ValueError, match=r"index.json is damaged"):
        read(chunk, "text")
    described.write_text(json.dumps(index))
    chunk.write_bytes(content[:-2])
    with pytest.raises(ValueError, match="its 3 items must follow one another"):
        read(chunk, "text")
    chunk.write_bytes(struct.pack("<I", 2**31) + content[4:])
    with pytest.raises(ValueError, match="its 2147483648 items must follow"):
        read(chunk, "text")


def test_a_pair_of_megatron_on_an_object_store_gives_its_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    flat = np.concatenate(DOCUMENTS).astype(np.uint16)
    lengths = np.array([len(ids) for ids in DOCUMENTS])
    head = HEADER.pack(MAGIC, 1, CODE_BY_DTYPE["uint16"], len(lengths), len(lengths) + 1)
    pointers = (np.cumsum(lengths) - lengths) * 2
    tail = (
        lengths.astype("<i4").tobytes()
        + pointers.astype("<i8").tobytes()
        + np.arange(len(lengths) + 1, dtype="<i8").tobytes()
    )
    (folder / "web.bin").write_bytes(flat.tobytes())
    (folder / "web.idx").write_bytes(head + tail)
    shutil.copy(folder / "web.idx", folder / "alone.idx")
    for name in ("chunk-0-0.bin", "index.json", "a.mds"):
        shutil.copy(WRITTEN / name, folder / name)
    with s3_server() as (variables, _):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        upload(folder, f"s3://{BUCKET}/pairs")
        assert read(f"s3://{BUCKET}/pairs/web.idx", "text", 10) == read(folder / "web.idx", "text") == DOCUMENTS
        assert read(f"s3://{BUCKET}/pairs/chunk-0-0.bin", "text") == DOCUMENTS
        assert read(f"s3://{BUCKET}/pairs/a.mds", "typed") == DOCUMENTS
        with pytest.raises(ValueError, match=r"alone.idx needs alone.bin next to it"):
            read(f"s3://{BUCKET}/pairs/alone.idx", "text")
