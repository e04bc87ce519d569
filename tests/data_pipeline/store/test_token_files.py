"""Token ids that other libraries wrote become a store, document by document, whatever the cut; damage is named.

The files of `flat_tokens/` were written by dolma 1.2.1 (`MemmapWriter`) and datatrove 0.10.1 (`TokenizedFile`), from DOCUMENTS.
nanoGPT's are written here as its `prepare.py` does, with numpy, and those of llm.c with their header.
"""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from amfm.data_pipeline.config import DataConfig, SourceConfig, TokenizerConfig
from amfm.data_pipeline.prepare.documents import SegmentReader
from amfm.data_pipeline.prepare.prepare import prepare
from amfm.data_pipeline.prepare.records import Reject, TokenDocument
from amfm.data_pipeline.prepare.segments import cut_segments
from amfm.data_pipeline.prepare.sources import list_files
from amfm.data_pipeline.store import token_files
from amfm.data_pipeline.store.store import TokenStore
from amfm.data_pipeline.verify import verify_store
from tests.data_pipeline.store.test_megatron_files import documents_of
from tests.helpers.tiny_store import make_tiny_store, run_in_process

WRITTEN = Path(__file__).with_name("flat_tokens")
END = 2
DOCUMENTS = [[5, 6, 7, END], [9, END], [11, 12, 13, 14, 15, END]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return make_tiny_store(tmp_path_factory.mktemp("data"))


def write_files(folder: Path) -> dict[str, Path]:
    """The same documents in every format, by its name."""
    for name in ("part-0.npy", "part-0.csv.gz", "00000_tokens.ds", "00000_tokens.ds.index"):
        shutil.copy(WRITTEN / name, folder / name)
    flat = np.concatenate(DOCUMENTS).astype(np.uint16)
    flat.tofile(folder / "nano.bin")
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(flat)
    (folder / "llm.bin").write_bytes(header.tobytes() + flat.tobytes())
    table = pyarrow.table({"input_ids": pyarrow.array(DOCUMENTS, pyarrow.list_(pyarrow.int32()))})
    pyarrow.parquet.write_table(table, folder / "ids.parquet")
    with pyarrow.ipc.new_stream(folder / "ids.arrow", table.schema) as stream:
        stream.write_table(table)
    (folder / "ids.jsonl").write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in DOCUMENTS))
    names = {
        "dolma": "part-0.npy",
        "datatrove": "00000_tokens.ds",
        "nanogpt": "nano.bin",
        "llm.c": "llm.bin",
        "parquet": "ids.parquet",
        "arrow": "ids.arrow",
        "jsonl": "ids.jsonl",
    }
    return {kind: folder / name for kind, name in names.items()}


FORMATS = ("dolma", "datatrove", "nanogpt", "llm.c", "parquet", "arrow", "jsonl")


def store_config(tiny: DataConfig, folder: Path, path: Path, **settings: object) -> DataConfig:
    model = str(TokenStore.open(tiny.store).tokenizer_path)
    source = SourceConfig.model_validate({"name": "web", "paths": (str(path),), "text_column": "input_ids", **settings})
    return DataConfig(
        store=str(folder / "store"),
        sources=(source,),
        tokenizer=TokenizerConfig(model=model),
        validation_fraction=0.0,
    )


@pytest.mark.parametrize("kind", FORMATS)
def test_documents_become_a_store_that_verifies(tiny: DataConfig, tmp_path: Path, kind: str) -> None:
    config = store_config(tiny, tmp_path, write_files(tmp_path)[kind])
    prepare(config, runner=run_in_process)
    assert sorted(documents_of(TokenStore.open(config.store), "web", "train")) == sorted(DOCUMENTS)
    assert verify_store(config.store) == []


@pytest.mark.parametrize("kind", ["dolma", "datatrove", "nanogpt", "llm.c"])
@pytest.mark.parametrize("segment_bytes", [1, 4, 10, 10_000])
def test_segments_cover_every_document_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, segment_bytes: int
) -> None:
    monkeypatch.setattr(token_files, "SPAN_TOKENS", 3)
    (file,) = list_files(SourceConfig(name="web", paths=(str(write_files(tmp_path)[kind]),)))
    found = [list(SegmentReader(each, "text", None, END)) for each in cut_segments(file, segment_bytes)]
    assert [item.tokens.tolist() for items in found for item in items if isinstance(item, TokenDocument)] == DOCUMENTS
    assert len(found) > 1 or segment_bytes == 10_000


def test_an_end_token_before_each_document_and_none_at_the_end_lose_nothing(tmp_path: Path) -> None:
    np.array([END, 5, 6, END, 7], np.uint16).tofile(tmp_path / "a.bin")
    (file,) = list_files(SourceConfig(name="web", paths=(str(tmp_path / "*.bin"),)))
    (segment,) = cut_segments(file, 100)
    empty, *rest = SegmentReader(segment, "text", None, END)
    assert isinstance(empty, Reject) and empty.reason == "empty document"
    assert [item.tokens.tolist() for item in rest if isinstance(item, TokenDocument)] == [[5, 6, END], [7]]


def test_a_folder_gives_no_bin_file_and_an_index_comes_first(tmp_path: Path) -> None:
    files = write_files(tmp_path)
    found = list_files(SourceConfig(name="web", paths=(str(tmp_path),)))
    assert {file.kind for file in found} == {"dolma", "datatrove", "parquet", "arrow", "jsonl"}
    files["nanogpt"].with_suffix(".idx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"nano.bin belongs to nano.idx, which states where documents end; name that"):
        list_files(SourceConfig(name="web", paths=(str(files["nanogpt"]),)))


def test_bad_files_are_refused(tiny: DataConfig, tmp_path: Path) -> None:
    files = write_files(tmp_path)

    def cut(kind: str) -> None:
        (file,) = list_files(SourceConfig(name="web", paths=(str(files[kind]),)))
        cut_segments(file, 100)

    (tmp_path / "part-0.csv.gz").write_bytes(gzip.compress(b"0,4,a,b,1\n5,12,a,b,2\n"))
    with pytest.raises(ValueError, match=r"part-0.csv.gz is damaged: documents must begin where the one before ends"):
        cut("dolma")
    (tmp_path / "part-0.csv.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match=r"part-0.csv.gz is damaged: "):
        cut("dolma")
    (tmp_path / "part-0.csv.gz").unlink()
    with pytest.raises(ValueError, match=r"part-0.npy needs part-0.csv.gz next to it"):
        cut("dolma")
    files["datatrove"].write_bytes(files["datatrove"].read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"has 22 bytes and its index 12 tokens"):
        cut("datatrove")
    files["llm.c"].write_bytes(files["llm.c"].read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"llm.bin states version 1 and 12 tokens in 1046 bytes"):
        cut("llm.c")
    files["nanogpt"].write_bytes(b"odd")
    with pytest.raises(ValueError, match=r"an odd number; token ids of nanoGPT have 2 bytes each"):
        cut("nanogpt")
    (tmp_path / "part-0.npy.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds tokens, which are read at random; unpack it"):
        list_files(SourceConfig(name="web", paths=(str(tmp_path / "*.npy.gz"),)))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_ids_in_a_column_need_their_tokenizer_and_no_filters(tiny: DataConfig, tmp_path: Path, kind: str) -> None:
    path = write_files(tmp_path)[kind]
    config = store_config(tiny, tmp_path, path, filters={"min_characters": 5})
    with pytest.raises(ValueError, match="filters need text; remove them"):
        prepare(config, runner=run_in_process)
    untrained = replace_tokenizer(store_config(tiny, tmp_path / "other", path))
    with pytest.raises(ValueError, match=r"source 'web' holds tokens, which mean nothing to a tokenizer trained here"):
        prepare(untrained, runner=run_in_process)


def replace_tokenizer(config: DataConfig) -> DataConfig:
    return config.model_copy(update={"tokenizer": TokenizerConfig()})


def test_a_file_without_end_tokens_is_of_another_tokenizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(token_files, "MOST_TOKENS", 4)
    monkeypatch.setattr(token_files, "SPAN_TOKENS", 3)
    np.full(20, 7, np.uint16).tofile(tmp_path / "a.bin")
    (file,) = list_files(SourceConfig(name="web", paths=(str(tmp_path / "a.bin"),)))
    (segment,) = cut_segments(replace(file), 100)
    with pytest.raises(ValueError, match=r"a.bin has no end token 2 in 4 tokens; give the tokenizer"):
        list(SegmentReader(segment, "text", None, END))
