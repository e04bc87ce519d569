from dataclasses import replace

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from amfm.data_pipeline.config import DataConfig, PrepareConfig, SourceConfig, TokenizerConfig
from amfm.data_pipeline.prepare.prepare import prepare
from amfm.data_pipeline.store.megatron_files import (
    HEADER,
    MAGIC,
    export_megatron,
    read_megatron_documents,
    read_megatron_index,
)
from amfm.data_pipeline.store.store import TokenStore
from amfm.data_pipeline.verify import verify_store
from tests.helpers.tiny_store import make_tiny_store, run_in_process


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_store(tmp_path_factory.mktemp("data"))


def documents_of(store, source, split):
    out = []
    for part in store.parts(source, split):
        tokens = store.read_tokens(part, 0, part.num_tokens)
        out += [piece.tolist() for piece in np.split(tokens, store.document_ends(part)[:-1].astype(int))]
    return out


def test_megatron_core_reads_what_we_export(tiny, tmp_path):
    store = TokenStore.open(tiny.store)
    count = export_megatron(store, "source0", "train", tmp_path / "out" / "web")
    theirs = IndexedDataset(str(tmp_path / "out" / "web"))
    ours = documents_of(store, "source0", "train")
    assert count == len(ours) == len(theirs) == len(theirs.document_indices) - 1
    assert [theirs[number].tolist() for number in range(count)] == ours


def import_config(tiny, tmp_path, path, **settings):
    model = str(TokenStore.open(tiny.store).tokenizer_path)
    return DataConfig(
        store=str(tmp_path / "imported"),
        sources=(SourceConfig(name="web", paths=(str(path),), **settings),),
        tokenizer=TokenizerConfig(model=model),
        prepare=PrepareConfig(part_bytes=20_000, chunk_tokens=512),
        validation_fraction=0.1,
    )


def test_what_megatron_core_writes_is_imported_without_tokenizing(tiny, tmp_path):
    """Documents of one or several sequences, with and without their own end token."""
    random = np.random.default_rng(0)
    documents = [random.integers(4, 400, size=random.integers(1, 90)).tolist() for _ in range(300)]
    for number in range(0, 300, 3):
        documents[number].append(2)
    builder = IndexedDatasetBuilder(str(tmp_path / "web.bin"), dtype=np.int32)
    for number, document in enumerate(documents):
        cut = len(document) // 2 if number % 5 == 0 and len(document) > 1 else len(document)
        for sequence in (document[:cut], document[cut:]):
            if sequence:
                builder.add_item(torch.tensor(sequence, dtype=torch.int32))
        builder.end_document()
    builder.finalize(str(tmp_path / "web.idx"))
    index = read_megatron_index(tmp_path / "web.idx")
    assert index.num_documents == 300 and index.dtype == "int32"
    read = [tokens.tolist() for tokens in read_megatron_documents(read_megatron_index(tmp_path / "web.idx"), 7, 20)]
    assert read == documents[7:20]
    config = import_config(tiny, tmp_path, tmp_path / "web.idx")
    report = prepare(config, runner=run_in_process)
    assert report.units_total > 2 and report.units_written == report.units_total
    store = TokenStore.open(config.store)
    found = documents_of(store, "web", "train") + documents_of(store, "web", "validation")
    expected = [document if document[-1] == 2 else [*document, 2] for document in documents]
    assert sorted(found) == sorted(expected)
    assert store.layout.dtype == "uint16" and verify_store(config.store) == []


@pytest.mark.parametrize("split", ["98,2,0", "969,30,1", "1,1", "7,2,1"])
def test_documents_are_held_out_as_megatron_core_does(tiny, tmp_path, split):
    random = np.random.default_rng(1)
    builder = IndexedDatasetBuilder(str(tmp_path / "web.bin"), dtype=np.int32)
    for number in range(203):
        document = [4 + number, *random.integers(4, 400, size=20).tolist(), 2]
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "web.idx"))
    config = import_config(tiny, tmp_path, tmp_path / "web").model_copy(update={"megatron_split": split})
    prepare(config, runner=run_in_process)
    store = TokenStore.open(config.store)
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    for name, bounds in zip(("train", "validation"), matrix):
        begin, end = (round(edge * 203) for edge in bounds)
        assert sorted(document[0] - 4 for document in documents_of(store, "web", name)) == list(range(begin, end))


def test_a_split_that_cuts_documents_is_refused(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "web.bin"), dtype=np.int32)
    builder.add_document(torch.arange(8), [4, 4])
    builder.finalize(str(tmp_path / "web.idx"))
    index = read_megatron_index(tmp_path / "web.idx")
    with pytest.raises(ValueError, match="2 sequences in 1 documents"):
        index.split("98,2,0")
    with pytest.raises(ValueError, match="megatron_split=0,0 leaves no documents"):
        replace(index, num_documents=2).split("0,0")


def test_export_of_an_import_gives_the_same_documents(tiny, tmp_path):
    store = TokenStore.open(tiny.store)
    export_megatron(store, "source0", "train", tmp_path / "a")
    config = import_config(tiny, tmp_path, tmp_path / "a.idx")
    prepare(config.model_copy(update={"validation_fraction": 0.0}), runner=run_in_process)
    again = TokenStore.open(config.store)
    assert sorted(documents_of(again, "web", "train")) == sorted(documents_of(store, "source0", "train"))


def test_links_in_the_place_of_exported_files_are_not_followed(tiny, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for name in ("out.bin", "out.idx", ".writing-out.idx"):
        (tmp_path / name).symlink_to(precious)
    store, source = TokenStore.open(tiny.store), tiny.sources[0].name
    documents = export_megatron(store, source, "train", tmp_path / "out")
    assert precious.read_text() == "precious"
    assert read_megatron_index(tmp_path / "out.idx").num_documents == documents


def test_bad_megatron_input_is_refused(tiny, tmp_path):
    export_megatron(TokenStore.open(tiny.store), "source0", "train", tmp_path / "a")
    index, tokens = tmp_path / "a.idx", tmp_path / "a.bin"
    with pytest.raises(ValueError, match=r"holds tokens; filters need text"):
        prepare(import_config(tiny, tmp_path, index, filters={"min_characters": 5}), runner=run_in_process)
    config = import_config(tiny, tmp_path, index)
    with pytest.raises(ValueError, match=r"name the file of the tokenizer that made them in data.tokenizer.model"):
        prepare(config.model_copy(update={"tokenizer": TokenizerConfig()}), runner=run_in_process)
    content = tokens.read_bytes()
    tokens.write_bytes(content[:-2])
    with pytest.raises(ValueError, match=r"a.bin has \d+ bytes, its index states \d+; restore both"):
        read_megatron_index(index).check()
    wrong = bytearray(content)
    wrong[:2] = (4000).to_bytes(2, "little")
    tokens.write_bytes(wrong)
    with pytest.raises(ValueError, match="source 'web' has token id 4000, but the vocabulary is 400"):
        prepare(import_config(tiny, tmp_path, index), runner=run_in_process)
    index.write_bytes(index.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"a.idx is truncated"):
        read_megatron_index(index)
    index.write_bytes(b"something else that is not an index at all, long enough")
    with pytest.raises(ValueError, match=r"a.idx is not a Megatron index"):
        read_megatron_index(index)
    tokens.unlink()
    with pytest.raises(ValueError, match=r"needs a.bin next to it"):
        prepare(import_config(tiny, tmp_path, index), runner=run_in_process)


@pytest.mark.parametrize(
    "bounds", [[0, 2, 1, 3], [0, 1, 2, 4], [-1, 1, 2, 3], [0, 1, 2, 2**60], [1, 1, 2, 3], [0, 1, 2, 2]]
)
def test_documents_that_are_none_of_the_sequences_are_refused(tmp_path, bounds):
    lengths = np.array([2, 1, 3], "<i4")
    content = HEADER.pack(MAGIC, 1, 8, 3, 4) + lengths.tobytes() + np.array([0, 4, 6], "<i8").tobytes()
    (tmp_path / "a.bin").write_bytes(np.arange(6, dtype="<u2").tobytes())
    (tmp_path / "a.idx").write_bytes(content + np.array([0, 1, 2, 3], "<i8").tobytes())
    index = read_megatron_index(tmp_path / "a.idx")
    index.check()
    assert index.num_documents == 3
    (tmp_path / "a.idx").write_bytes(content + np.array(bounds, "<i8").tobytes())
    with pytest.raises(ValueError, match=r"a.idx is damaged: its documents must begin one after the other"):
        index.check()
    if bounds[0] == 0 and bounds[-1] != 2:  # what is wrong between two readers' ranges only the plan sees
        with pytest.raises(ValueError, match=r"a.idx is damaged: its documents must begin one after the other"):
            list(read_megatron_documents(read_megatron_index(tmp_path / "a.idx"), 0, 3))


@pytest.mark.parametrize("lengths", [[2, -1, 5], [-1, 1, 6], [6, 2**31 - 1, -(2**31 - 1)]])
def test_a_sequence_of_negative_length_is_refused(tmp_path, lengths):
    """The sums fit the .bin, and to read it would give the rest of the file for the document."""
    pointers = np.cumsum([0, *lengths[:-1]]) * 2
    (tmp_path / "a.bin").write_bytes(np.arange(6, dtype="<u2").tobytes())
    content = HEADER.pack(MAGIC, 1, 8, 3, 4) + np.array(lengths, "<i4").tobytes() + pointers.astype("<i8").tobytes()
    (tmp_path / "a.idx").write_bytes(content + np.array([0, 1, 2, 3], "<i8").tobytes())
    with pytest.raises(ValueError, match=r"a.idx is damaged: a sequence has a negative length"):
        read_megatron_index(tmp_path / "a.idx").check()
    with pytest.raises(ValueError, match=r"a.idx is damaged"):
        list(read_megatron_documents(read_megatron_index(tmp_path / "a.idx"), 0, 3))
