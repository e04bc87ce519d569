import gzip
import json
import multiprocessing
import os
import pickle
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import obstore
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from obstore.store import from_url

from amfm.data_pipeline.config import CacheConfig, SourceConfig
from amfm.data_pipeline.loader.loader import PretrainLoader
from amfm.data_pipeline.prepare.documents import SegmentReader
from amfm.data_pipeline.prepare.prepare import prepare
from amfm.data_pipeline.prepare.records import Document
from amfm.data_pipeline.prepare.segments import cut_segments
from amfm.data_pipeline.prepare.sources import list_files
from amfm.data_pipeline.store.node_cache import CacheSettings
from amfm.data_pipeline.store.object_store import NoCredentialsError, RemoteFolder
from amfm.data_pipeline.store.shards import DamagedError
from amfm.data_pipeline.store.store import TokenStore
from amfm.data_pipeline.tokenizer.tokenizer import load_tokenizer
from amfm.data_pipeline.verify import verify_store
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.s3 import BUCKET, s3_server, upload
from tests.helpers.tiny_store import make_tiny_store, run_in_process

BLOCK = 2**16


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with s3_server() as (variables, requests):
        before = dict(os.environ)
        os.environ.update(variables | {"HOME": str(tmp_path_factory.mktemp("home"))})
        yield requests
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def local(server, tmp_path_factory):
    """A store on disk whose copy is behind the URL; its shards have several blocks."""
    config = make_tiny_store(tmp_path_factory.mktemp("data"), num_documents=250, mean_words=200, part_bytes=2_000_000)
    upload(config.store, f"s3://{BUCKET}/store")
    return config


@pytest.fixture()
def remote(local, tmp_path):
    cache = CacheConfig(folder=str(tmp_path / "cache"), block_bytes=BLOCK)
    return local.model_copy(update={"store": f"s3://{BUCKET}/store", "cache": cache})


@pytest.fixture()
def copied(local, remote, tmp_path):
    """A copy that a test may damage: (config, client of its folder, a shard file of the first training part)."""
    url = f"s3://{BUCKET}/{tmp_path.name}"
    upload(local.store, url)
    part = TokenStore.open(local.store).parts("source0", "train")[0]
    return remote.model_copy(update={"store": url}), from_url(url), f"{part.path}/tokens/c/0"


def rows(config, steps=16, **settings):
    loader = PretrainLoader(config, sequence_length=64, micro_batch_size=8, seed=1, **settings)
    taken = [batch.tokens_BT.tolist() for _ in range(steps) for batch in loader.take(16)]
    loader.close()
    return taken


def cached_files(config):
    return [path for path in Path(config.cache.folder, "blocks").rglob("*") if path.is_file() and len(path.name) == 40]


@pytest.mark.parametrize(
    ("packing", "shuffle", "workers"),
    [
        ("concatenate", "full", 0),
        pytest.param("best_fit", "full", 0, marks=pytest.mark.slow),
        pytest.param("concatenate", "block", 1, marks=pytest.mark.slow),
    ],
)
def test_a_store_behind_a_url_trains_as_its_folder_does(local, remote, workers, shuffle, packing):
    changes = {"shuffle": shuffle, "packing": packing, "num_workers": workers}
    assert rows(remote.model_copy(update=changes), 4) == rows(local.model_copy(update=changes), 4)


def test_a_block_is_requested_once_a_node_and_not_once_a_sample(server, local, remote):
    store = TokenStore.open(local.store)
    num_blocks = sum(-(-size // BLOCK) for p in store.parts("source0", "train") for size in p.token_shards)
    server.seen.clear()
    expected = rows(local)
    assert rows(remote) == expected and len(expected) == 32
    # 256 samples; a window of 64 tokens may be in two blocks. Next to them the manifest, the tokenizer, the listing.
    assert 0 < server.gets("/tokens/") <= num_blocks < 40
    assert server.gets("manifest.json") == server.gets("tokenizer.model") == 1
    server.seen.clear()
    assert rows(remote) == expected
    assert server.gets("/tokens/") == server.gets("/document_ends/") == 0, "another process of the node finds them"


def test_a_reading_process_fetches_blocks_before_their_rows_are_due(server, remote, tmp_path):
    server.seen.clear()
    expected, num_blocks = rows(remote, 40), server.gets("/tokens/")
    cache = remote.cache.model_copy(update={"folder": str(tmp_path / "other")})
    config = remote.model_copy(update={"num_workers": 1, "cache": cache})
    server.seen.clear()
    loader = PretrainLoader(config, sequence_length=64, micro_batch_size=8, seed=1)
    taken = [batch.tokens_BT.tolist() for batch in loader.take(16)]
    deadline = time.monotonic() + PATIENCE_SECONDS
    while server.gets("/tokens/") < num_blocks and time.monotonic() < deadline:
        time.sleep(0.1)
    fetched = server.gets("/tokens/")
    for _ in range(39):
        taken += [batch.tokens_BT.tolist() for batch in loader.take(16)]
    loader.close()
    assert taken == expected and fetched >= num_blocks, "the blocks of 640 rows came with the first 16"


def test_the_cache_keeps_to_its_limit_and_deletes_what_was_not_used_for_longest(local, remote):
    small = remote.model_copy(
        update={"cache": remote.cache.model_copy(update={"max_bytes": 5 * BLOCK}), "shuffle": "block"}
    )
    store = TokenStore.open(small.store, CacheSettings(**small.cache.model_dump()))
    reference = TokenStore.open(local.store)
    for _ in range(2):
        for _, _, part in store.all_parts():
            got = store.read_tokens(part, 0, part.num_tokens)
            assert np.array_equal(got, reference.read_tokens(part, 0, part.num_tokens))
            assert sum(path.stat().st_size for path in cached_files(small)) <= 6 * BLOCK


def test_a_cache_too_small_for_the_shuffle_is_refused(remote):
    small = remote.model_copy(update={"cache": remote.cache.model_copy(update={"max_bytes": 2 * BLOCK})})
    message = r"data.cache.max_bytes=131072 must be at least \d+, .* data.shuffle=full .*; raise it, or use data.shuffle=block"
    with pytest.raises(ValueError, match=message):
        rows(small)


def test_a_damaged_block_of_the_cache_is_fetched_again(local, remote, server, caplog):
    expected = rows(local)
    assert rows(remote) == expected
    for path in cached_files(remote):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    server.seen.clear()
    assert rows(remote) == expected
    assert server.gets("/tokens/") > 0 and "is damaged; the block is fetched again" in caplog.text


def test_a_missing_object_is_found_at_the_start(copied):
    config, client, shard = copied
    obstore.delete(client, shard)
    with pytest.raises(DamagedError, match=rf"{config.store}/{shard} is missing"):
        rows(config)
    lax = config.model_copy(update={"on_corruption": "quarantine"})
    loader = PretrainLoader(lax, sequence_length=64, micro_batch_size=8, seed=1)
    for _ in range(16):
        loader.take(16)
    assert loader.quarantined and f"{config.store}/{shard} is missing" in loader.quarantined[0].reason


@pytest.mark.slow
def test_a_truncated_object_names_both_sizes(copied):
    config, client, shard = copied
    content = bytes(obstore.get(client, shard).bytes())
    obstore.put(client, shard, content[:-100])
    message = rf"{shard} has {len(content) - 100} bytes, the manifest states {len(content)}"
    with pytest.raises(DamagedError, match=message):
        rows(config)
    store = TokenStore.open(config.store, CacheSettings(**config.cache.model_dump()))
    part = store.parts("source0", "train")[0]
    with pytest.raises(DamagedError, match=message):  # without the listing: while training, at the first block
        store.read_tokens(part, 0, 1)


def test_an_altered_object_is_an_error_and_does_not_stay_in_the_cache(copied):
    config, client, shard = copied
    content = bytes(obstore.get(client, shard).bytes())
    obstore.put(client, shard, content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    store = TokenStore.open(config.store, CacheSettings(**config.cache.model_dump()))
    part = store.parts("source0", "train")[0]
    with pytest.raises(DamagedError, match=rf"{shard} is damaged: chunk 0 fails its crc32c"):
        store.read_tokens(part, 0, 1000)
    assert any(
        f"{part.path}: its files are not those of the manifest" in text or "crc32c" in text
        for text in verify_store(config.store)
    )
    obstore.put(client, shard, content)
    assert len(store.read_tokens(part, 0, 1000)) == 1000
    assert verify_store(config.store) == []


@pytest.mark.slow
def test_a_changed_manifest_and_another_tokenizer_are_noticed(copied):
    config, client, _ = copied
    manifest = json.loads(bytes(obstore.get(client, "manifest.json").bytes()))
    other = json.loads(json.dumps(manifest))
    other["sources"]["source0"]["train"][0]["num_tokens"] += 1
    obstore.put(client, "manifest.json", json.dumps(other).encode())
    with pytest.raises(DamagedError, match="it was edited or damaged"):
        rows(config)
    obstore.put(client, "manifest.json", json.dumps(manifest).encode())
    model = bytes(obstore.get(client, "tokenizer.model").bytes())
    obstore.put(client, "tokenizer.model", model.replace(b"\xe2\x96\x81", b"\xe2\x96\x82", 1))
    with pytest.raises(RuntimeError, match=r"has identity .*, but the store was written with"):
        load_tokenizer(config.store)


def test_a_folder_without_a_store_and_an_unknown_scheme_are_refused(remote, tmp_path):
    with pytest.raises(ValueError, match=r"data.store='s3://texts/nothing' must hold a prepared store"):
        rows(remote.model_copy(update={"store": f"s3://{BUCKET}/nothing"}))
    with pytest.raises(ValueError, match=r"ftp://a/b must begin with s3://, .* or be a local path"):
        rows(remote.model_copy(update={"store": "ftp://a/b"}))
    with pytest.raises(ValueError, match="must be a folder to write in; prepare there, copy the folder"):
        prepare(remote, runner=run_in_process)


def test_a_store_that_cannot_be_reached_is_one_message_and_no_damage(monkeypatch, remote):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        folder = RemoteFolder(remote.store)
        monkeypatch.setattr("obstore.store.from_url", lambda url: from_url(url, retry_config={"max_retries": 0}))
        with pytest.raises(
            RuntimeError, match=r"manifest.json cannot be read: .*; check the network, the credentials"
        ) as caught:
            folder.read("manifest.json")
        assert not isinstance(caught.value, DamagedError | NoCredentialsError)
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        for name in [name for name in os.environ if name.startswith(("AWS_ACCESS", "AWS_SECRET"))]:
            monkeypatch.delenv(name)
        with pytest.raises(NoCredentialsError, match="no credentials were found; set AWS_ACCESS_KEY_ID"):
            RemoteFolder(remote.store).read("manifest.json")


def test_a_pickled_handle_opens_the_same_store(remote):
    store = TokenStore.open(remote.store, CacheSettings(**remote.cache.model_dump()))
    again = pickle.loads(pickle.dumps(store))
    part = store.parts("source0", "train")[0]
    assert again.path == store.path and np.array_equal(again.read_tokens(part, 5, 500), store.read_tokens(part, 5, 500))
    shutil.rmtree(store.path)


def every_kind(folder):
    """A folder with a file of each kind, plain and compressed."""
    records = [{"text": f"document {number} é 漢 " + "x" * (number * 7 % 53)} for number in range(200)]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    table = pyarrow.table({"text": [record["text"] for record in records]})
    (folder / "sub").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    with pyarrow.CompressedOutputStream(str(folder / "sub/c.jsonl.zst"), "zstd") as stream:
        stream.write(lines)
    (folder / "d.txt").write_text("one text")
    pyarrow.parquet.write_table(table, folder / "sub/e.parquet", row_group_size=70)
    with pyarrow.ipc.new_stream(folder / "f.arrow", table.schema) as stream:
        stream.write_table(table)
    (folder / "notes.json").write_text("{}")
    (folder / ".hidden.txt").write_text("hidden")
    return folder


@pytest.mark.parametrize(
    "pattern", ["", "/sub/[ce]*", *(pytest.param(each, marks=pytest.mark.slow) for each in ("/**/*.*", "/a.jsonl"))]
)
def test_sources_behind_a_url_are_read_as_local_ones(server, tmp_path, pattern):
    folder = every_kind(tmp_path / "texts")
    upload(folder, f"s3://{BUCKET}/{tmp_path.name}")

    def read(path):
        files = list_files(SourceConfig(name="web", paths=(path,)))
        segments = [segment for file in files for segment in cut_segments(file, 700)]
        return [file.name for file in files], [item for s in segments for item in SegmentReader(s, "text")]

    names, documents = read(f"s3://{BUCKET}/{tmp_path.name}{pattern}")
    assert (names, documents) == read(f"{folder}{pattern}")
    assert len(documents) > 190 and all(isinstance(item, Document) for item in documents)


def test_a_prefix_of_megatron_behind_a_url_is_its_pair(server, tmp_path):
    (tmp_path / "web_document.idx").write_bytes(b"index")
    (tmp_path / "web_document.bin").write_bytes(b"tokens")
    upload(tmp_path, f"s3://{BUCKET}/{tmp_path.name}")
    (file,) = list_files(SourceConfig(name="web", paths=(f"s3://{BUCKET}/{tmp_path.name}/web_document",)))
    assert (file.kind, file.num_bytes) == ("megatron", 6) and file.path.endswith("/web_document.idx")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "does not exist; name a file, a folder or a glob"),
        ("*.txt", "does not exist; name a file, a folder or a glob"),
        ("a.zip", "must end in .txt, .md, .jsonl"),
        ("x.idx", "x.idx needs x.bin next to it; restore the pair"),
    ],
)
def test_urls_that_give_nothing_are_refused_with_a_remedy(server, tmp_path, name, message):
    for given in ("a.zip", "x.idx"):
        (tmp_path / given).write_bytes(b"x")
    upload(tmp_path, f"s3://{BUCKET}/{tmp_path.name}")
    with pytest.raises(ValueError, match=message):
        list_files(SourceConfig(name="web", paths=(f"s3://{BUCKET}/{tmp_path.name}/{name}",)))


def test_a_store_prepared_from_urls_is_the_store_of_the_local_texts(local, server, tmp_path):
    texts = Path(local.store).parent / "text0.jsonl"
    obstore.put(from_url(f"s3://{BUCKET}/corpus"), "text0.jsonl", texts.read_bytes())
    source = local.sources[0].model_copy(update={"paths": (f"s3://{BUCKET}/corpus/text0.jsonl",)})
    config = local.model_copy(update={"store": str(tmp_path / "store"), "sources": (source,)})
    report = prepare(config, runner=run_in_process)
    assert report.identity == TokenStore.open(local.store).identity()
    assert prepare(config, runner=run_in_process).units_written == 0


def test_a_forked_process_is_told_to_be_spawned(remote):
    store = TokenStore.open(remote.store, CacheSettings(**remote.cache.model_dump()))
    part = store.parts("source0", "train")[0]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def read():
        try:
            store.read_tokens(part, 0, 1)
        except RuntimeError as error:
            answers.put(str(error))

    process = context.Process(target=read)
    process.start()
    assert "cannot be read in a forked process; start the process by spawn" in answers.get(timeout=PATIENCE_SECONDS)
    process.join()
