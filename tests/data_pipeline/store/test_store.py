import gc
import multiprocessing
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from amfm.data_pipeline.prepare.prepare import prepare
from amfm.data_pipeline.store.manifest import Layout
from amfm.data_pipeline.store.part_writer import write_part
from amfm.data_pipeline.store.shards import DamagedError, ShardedArray, encode_shard
from amfm.data_pipeline.store.store import TokenStore
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.tiny_store import make_tiny_store, run_in_process


@pytest.fixture(scope="module", params=["fast", "balanced", "small"])
def prepared(request, tmp_path_factory):
    return make_tiny_store(tmp_path_factory.mktemp(request.param), preset=request.param)


@pytest.fixture()
def copied(prepared, tmp_path):
    """A store that a test may damage."""
    shutil.copytree(prepared.store, tmp_path / "store")
    return TokenStore.open(tmp_path / "store")


def first_part(store):
    return next(part for _, split, part in store.all_parts() if split == "train")


def test_zarr_python_reads_every_array_identically(prepared):
    store = TokenStore.open(prepared.store)
    for source, split, part in store.all_parts():
        group = zarr.open_group(store.path / part.path, mode="r")
        tokens, ends = group["tokens"][:], group["document_ends"][:]
        assert tokens.dtype == np.uint16 and ends.dtype == np.uint64
        assert np.array_equal(tokens, store.read_tokens(part, 0, part.num_tokens))
        assert np.array_equal(ends, store.document_ends(part))
        assert np.array_equal(group["chunk_heads"][:], tokens[:: store.layout.chunk_tokens])
        assert (group.attrs["source"], group.attrs["split"]) == (source, split)
        assert (tokens[ends.astype(int) - 1] == store.eos_id).all()


@pytest.mark.parametrize(
    ("preset", "length"),
    [
        pytest.param(preset, length, marks=[] if preset == "fast" or length == 1000 else [pytest.mark.slow])
        for preset in ("fast", "balanced", "small")
        for length in (1, 63, 64, 65, 1000, 2500)
    ],
)
def test_our_shards_are_what_zarr_python_reads_at_odd_lengths(tmp_path, preset, length, monkeypatch):
    monkeypatch.setattr("amfm.data_pipeline.store.part_writer.MAX_SHARD_TOKENS", 1024)  # several shards
    layout = Layout("uint32", 64, preset)
    tokens = np.random.default_rng(length).integers(0, 2**32, size=length, dtype=np.uint32)
    ends = np.array([length], np.uint64)
    part = write_part(tmp_path, "p.zarr", tokens, ends, text_bytes=0, layout=layout, attributes={})
    assert np.array_equal(zarr.open_group(tmp_path / "p.zarr", mode="r")["tokens"][:], tokens)
    assert len(part.token_shards) == -(-length // 1024)
    shard = 1024 if length > 1024 else -(-length // 64) * 64
    ours = ShardedArray(
        tmp_path / "p.zarr" / "tokens", "uint32", length, chunk=64, shard=shard, compression=layout.compression
    )
    assert np.array_equal(ours.read_all(), tokens)
    for heads in (None, tokens[::64]):
        ours.heads = heads
        for start in (*range(0, length, 97), *range(0, length, 64)):
            for stop in (min(length, start + 211), min(length, start + 65), min(length, start + 1)):
                assert np.array_equal(ours.read(start, stop), tokens[start:stop])
    ours.close()


def test_a_row_that_ends_with_the_first_token_of_a_chunk_leaves_that_chunk_alone(copied):
    part = first_part(copied)
    expected = copied.read_tokens(part, 0, part.num_tokens)
    chunk = copied.layout.chunk_tokens
    file = copied.path / part.path / "tokens" / "c" / "0"
    copied.close()
    content = bytearray(file.read_bytes())
    second = int(np.frombuffer(content[-16 * (-(-part.num_tokens // chunk)) - 4 : -4], "<u8")[2])
    content[second + 5] ^= 1  # the second chunk is damaged now
    file.write_bytes(content)
    assert np.array_equal(copied.read_tokens(part, 0, chunk + 1), expected[: chunk + 1])
    with pytest.raises(DamagedError, match="chunk 1 fails its crc32c"):
        copied.read_tokens(part, 0, chunk + 2)


@pytest.mark.parametrize("preset", ["fast", "balanced", "small"])
def test_the_metadata_of_a_part_is_what_zarr_python_writes_for_its_lengths(tmp_path, preset):
    layout, length = Layout("uint16", 64, preset), 1000
    ends = np.array([300, length], np.uint64)
    attributes = {"source": "web", "inputs": [["a.jsonl", 0, 9]]}
    tokens = np.arange(length, dtype=np.uint16)
    write_part(tmp_path, "part.zarr", tokens, ends, text_bytes=1, layout=layout, attributes=attributes)
    written = zarr.open_group(tmp_path / "part.zarr", mode="r")
    twin = zarr.create_group(tmp_path / "twin", zarr_format=3, attributes=attributes)
    for name in ("tokens", "document_ends", "chunk_heads"):
        ours = written[name]
        twin.create_array(
            name, shape=ours.shape, dtype=ours.dtype, chunks=ours.chunks, shards=ours.shards,
            compressors=ours.compressors, fill_value=0,
        )  # fmt: skip
    assert [written[name].shape for name in ("tokens", "document_ends", "chunk_heads")] == [(1000,), (2,), (16,)]
    for file in ("zarr.json", "tokens/zarr.json", "document_ends/zarr.json", "chunk_heads/zarr.json"):
        assert (tmp_path / "part.zarr" / file).read_bytes() == (tmp_path / "twin" / file).read_bytes()


@pytest.mark.parametrize("compression", ["none", "lz4hc", "zstd"])
def test_our_bytes_are_those_that_zarr_python_writes(tmp_path, compression):
    from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

    codecs = {
        "none": [],
        "lz4hc": [BloscCodec(cname="lz4hc", clevel=5, shuffle="noshuffle", typesize=2)],
        "zstd": [ZstdCodec(level=3)],
    }
    tokens = np.random.default_rng(0).integers(1, 300, size=1000, dtype=np.uint16)
    array = zarr.create_array(
        tmp_path / "a", shape=(1000,), dtype="uint16", chunks=(128,), shards=(1024,),
        compressors=[*codecs[compression], Crc32cCodec()], fill_value=0,
    )  # fmt: skip
    array[:] = tokens
    assert (tmp_path / "a" / "c" / "0").read_bytes() == encode_shard(tokens, 128, 1024, compression)


def test_opening_a_store_leaves_the_garbage_collector_as_it_was(prepared):
    TokenStore.open(prepared.store)
    assert gc.isenabled()


def test_documents_that_end_elsewhere_are_damage(copied):
    part = first_part(copied)
    for wrong in (replace(part, num_tokens=part.num_tokens - 1), replace(part, num_documents=0)):
        with pytest.raises(DamagedError, match="documents do not end at its"):
            copied.document_ends(wrong)


def test_identity_depends_on_the_content_alone(prepared, tmp_path):
    again = make_tiny_store(tmp_path, preset=prepared.prepare.preset)
    assert TokenStore.open(again.store).identity() == TokenStore.open(prepared.store).identity()
    other = make_tiny_store(tmp_path / "other", preset=prepared.prepare.preset, seed=1)
    assert TokenStore.open(other.store).identity() != TokenStore.open(prepared.store).identity()


def test_every_flipped_bit_of_a_shard_is_noticed(copied):
    file = copied.path / first_part(copied).path / "tokens" / "c" / "0"
    content = bytearray(file.read_bytes())
    random = np.random.default_rng(0)
    for place in [0, len(content) - 1, *random.integers(0, len(content), 20).tolist()]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(random.integers(8))
        file.write_bytes(damaged)
        part = first_part(copied)
        with pytest.raises(DamagedError, match=r"damaged|truncated"):
            copied.read_tokens(part, 0, part.num_tokens)
        copied.close()


def test_a_truncated_shard_is_an_error_that_names_file_and_sizes(copied):
    part = first_part(copied)
    file = copied.path / part.path / "tokens" / "c" / "0"
    os.truncate(file, file.stat().st_size - 5)
    with pytest.raises(DamagedError, match=r"tokens/c/0 has \d+ bytes, the manifest states \d+; delete"):
        list(copied.check_files())
    with pytest.raises(DamagedError, match="the manifest states"):
        copied.read_tokens(part, 0, 1)


def test_a_missing_shard_is_an_error_and_not_zeros(copied):
    part = first_part(copied)
    (copied.path / part.path / "tokens" / "c" / "0").unlink()
    with pytest.raises(DamagedError, match="is missing; run `amfm prepare CONFIG`"):
        copied.read_tokens(part, 0, 1)


def test_an_edited_manifest_is_noticed(copied):
    manifest = copied.path / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"eos_id": 2', '"eos_id": 1'))
    with pytest.raises(DamagedError, match="it was edited or damaged"):
        TokenStore.open(copied.path)
    manifest.write_text(text[: len(text) // 2])
    with pytest.raises(DamagedError, match=r"manifest.json is damaged"):
        TokenStore.open(copied.path)
    manifest.write_text(text.replace('"version": 3', '"version": 9'))
    with pytest.raises(ValueError, match="format version 9, this program reads 3"):
        TokenStore.open(copied.path)


def test_a_part_of_another_store_with_equal_sizes_is_noticed_when_it_is_opened(tmp_path):
    one = make_tiny_store(tmp_path, num_documents=50, part_bytes=10**6, validation_fraction=0.0)
    in_another_order = one.prepare.model_copy(update={"seed": 1})
    other = one.model_copy(update={"store": str(tmp_path / "other"), "prepare": in_another_order})
    prepare(other, runner=run_in_process)
    store, part = TokenStore.open(one.store), first_part(TokenStore.open(one.store))
    sizes = {path.relative_to(one.store): path.stat().st_size for path in Path(one.store, part.path).rglob("c/*")}
    shutil.rmtree(store.path / part.path)
    shutil.copytree(Path(other.store, part.path), store.path / part.path)
    assert {
        path.relative_to(one.store): path.stat().st_size for path in Path(one.store, part.path).rglob("c/*")
    } == sizes
    for reader in (store, TokenStore.open(one.store)):
        with pytest.raises(DamagedError, match="is not the part that the manifest names: it is of another store"):
            reader.read_tokens(part, 0, 1)
    # Of a store that was prepared before there was a digest nothing more is asked than before.
    manifest = store.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace(part.opening_digest, ""))
    old = TokenStore.open(one.store)
    assert old.identity() == store.identity() and len(old.read_tokens(first_part(old), 0, 10)) == 10


def test_a_folder_that_is_no_store_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match="must hold a prepared store; run `amfm prepare CONFIG` first"):
        TokenStore.open(tmp_path / "nothing")


def test_an_unknown_source_is_refused_with_the_known_ones(prepared):
    with pytest.raises(ValueError, match="source 'web' must be one of the store's source0"):
        TokenStore.open(prepared.store).parts("web", "train")


def sum_tokens(store, results):
    results.put(sum(int(store.read_tokens(p, 0, p.num_tokens).astype(np.int64).sum()) for _, _, p in store.all_parts()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_that_was_read_works_in_forked_and_spawned_processes(tmp_path, method):
    store = TokenStore.open(make_tiny_store(tmp_path, num_documents=50).store)
    expected = sum(int(store.read_tokens(p, 0, p.num_tokens).astype(np.int64).sum()) for _, _, p in store.all_parts())
    context = multiprocessing.get_context(method)
    results = context.Queue()
    process = context.Process(target=sum_tokens, args=(store, results))
    process.start()
    assert results.get(timeout=PATIENCE_SECONDS) == expected
    process.join()


def test_a_store_that_changed_under_a_pickled_handle_is_refused(copied, tmp_path):
    content = pickle.dumps(copied)
    shutil.rmtree(copied.path)
    other = make_tiny_store(tmp_path / "other", seed=5)
    shutil.copytree(other.store, copied.path)
    with pytest.raises(DamagedError, match="changed while it was in use"):
        pickle.loads(content)
