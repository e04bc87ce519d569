import re
import shutil

import numpy as np
import pytest

from amfm.data_pipeline.loader.loader import PretrainLoader
from amfm.data_pipeline.store.manifest import DOCUMENT_CHUNK
from amfm.data_pipeline.store.shards import encode_shard
from amfm.data_pipeline.store.store import TokenStore
from amfm.data_pipeline.tokenizer.tokenizer import load_tokenizer
from amfm.data_pipeline.verify import sample_text, verify_store
from tests.helpers.tiny_store import make_tiny_store


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_tiny_store(tmp_path_factory.mktemp("data"), num_sources=2, preset="small")


@pytest.mark.parametrize("full", [True, False])
def test_a_sound_store_has_no_findings(config, full):
    assert verify_store(config.store, full=full) == []


def test_full_finds_what_quick_cannot_and_both_find_missing_and_short_files(config, tmp_path):
    shutil.copytree(config.store, tmp_path / "store")
    store = TokenStore.open(tmp_path / "store")
    parts = [part for _, _, part in store.all_parts()]
    flipped, short, missing, renamed = (store.path / part.path for part in parts[:4])
    shard = flipped / "tokens" / "c" / "0"
    content = bytearray(shard.read_bytes())
    content[50] ^= 1
    shard.write_bytes(content)
    shard = short / "tokens" / "c" / "0"
    shard.write_bytes(shard.read_bytes()[:-1])
    (missing / "document_ends" / "c" / "0").unlink()
    (renamed / "zarr.json").write_text((renamed / "zarr.json").read_text() + " ")
    quick, full = verify_store(store.path, full=False), verify_store(store.path, full=True)
    assert len(quick) == 2 and "the manifest states" in quick[0] and "is missing" in quick[1]
    assert len(full) == 4 and "fails its crc32c" in full[0] and "are not those of the manifest" in full[3]


def test_chunk_heads_that_are_not_those_of_the_tokens_are_a_finding(config, tmp_path):
    """Sound files with the wrong contents, as a faulty writer would leave them."""
    shutil.copytree(config.store, tmp_path / "store")
    store = TokenStore.open(tmp_path / "store")
    part = store.parts(store.source_names[0], "train")[0]
    heads = store.chunk_heads(part).copy()
    heads[-1] += 1
    file = store.path / part.path / "chunk_heads" / "c" / "0"
    file.write_bytes(encode_shard(heads, DOCUMENT_CHUNK, DOCUMENT_CHUNK, store.layout.compression))
    assert "another store" in verify_store(store.path, full=True)[0]
    manifest = store.path / "manifest.json"
    manifest.write_text(re.sub(r'("opening_digest": )"\w+"', r'\1""', manifest.read_text()))  # as before parts had one
    findings = verify_store(store.path, full=True)
    assert "its chunk heads are not the first tokens of its chunks" in findings[0]


def test_a_replaced_tokenizer_and_an_edited_manifest_are_findings(config, tmp_path):
    shutil.copytree(config.store, tmp_path / "store")
    (tmp_path / "store" / "tokenizer.model").write_bytes(b"other")
    (finding,) = verify_store(tmp_path / "store", full=False)
    assert "is not a SentencePiece model" in finding
    (tmp_path / "store" / "manifest.json").write_text("{")
    (finding,) = verify_store(tmp_path / "store")
    assert "manifest.json is damaged" in finding


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_sample_text_shows_what_the_loader_gives(config, packing):
    config = config.model_copy(update={"packing": packing})
    loader = PretrainLoader(config, sequence_length=128, micro_batch_size=1, seed=3)
    tokenizer = load_tokenizer(config.store)
    for batch in loader.take(12):
        (sample,) = batch.sample_ids
        shown = sample_text(config, sample, sequence_length=128, seed=3)
        assert shown.source == loader.source_names[batch.source_ids[0]]
        assert shown.tokens == tuple(batch.tokens_BT[0, : len(shown.tokens)].tolist())
        assert "".join(shown.documents) == tokenizer.decode(list(shown.tokens))
        real = batch.document_ids_BT[0, : len(shown.tokens)]
        assert len(shown.documents) == int(real.max()) + 1
        part = next(part for _, _, part in loader.store.all_parts() if part.path == shown.part)
        ends = loader.store.document_ends(part)
        assert shown.first_document < len(ends) and np.all(ends[: shown.first_document] <= ends[-1])
