"""Data sets by name, on a server that speaks the Hub's API: which files, which commit, which words without a network."""

from __future__ import annotations

import io
import json
import socket
import threading
from collections.abc import Iterator

import pyarrow
import pyarrow.parquet
import pytest

from amfm.data_pipeline.config import DataConfig, PrepareConfig, SourceConfig, TokenizerConfig
from amfm.data_pipeline.prepare.hub import ATTEMPTS, parse_hub
from amfm.data_pipeline.prepare.plan import plan_source
from amfm.data_pipeline.prepare.sources import list_files
from amfm.data_pipeline.store.store import TokenStore
from tests.data_pipeline.prepare.stores import contents, in_process
from tests.helpers.hub import Hub, hub_server
from tests.helpers.tiny_store import make_text, write_jsonl

NAME = "owner/texts"
CARD = {
    "configs": [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*/*"}]},
        {"config_name": "sample-small", "data_files": [{"split": "train", "path": "sample/small/*"}]},
    ]
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[Hub]:
    with hub_server() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        for name in ("HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        yield hub


def parquet(texts: list[str], rows: int = 10) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "url": texts}), file, row_group_size=rows)
    return file.getvalue()


def texts(seed: int, number: int = 60) -> list[str]:
    import numpy as np

    random = np.random.default_rng(seed)
    return [make_text(random, 30) for _ in range(number)]


def shards() -> dict[str, bytes]:
    return {
        "README.md": b"a README is not text",
        "data/a/0.parquet": parquet(texts(1)),
        "data/b/1.parquet": parquet(texts(2)),
        "sample/small/0.parquet": parquet(texts(3)),
    }


def config_of(tmp_path, *paths: str, **source) -> DataConfig:
    return DataConfig(
        store=str(tmp_path / "store"),
        sources=(SourceConfig(name="web", paths=paths, **source),),
        tokenizer=TokenizerConfig(vocab_size=400, algorithm="bpe"),
        prepare=PrepareConfig(part_bytes=20_000, chunk_tokens=512),
        validation_fraction=0.1,
    )


def names(path: str) -> list[str]:
    return [file.name for file in list_files(SourceConfig(name="web", paths=(path,)))]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (f"hub:{NAME}", ["0/data/a/0.parquet", "0/data/b/1.parquet"]),
        (f"hub:{NAME}/sample-small", ["0/sample/small/0.parquet"]),
        (f"hub:{NAME}/data", ["0/data/a/0.parquet", "0/data/b/1.parquet"]),
        (f"hub:{NAME}/data/b/1.parquet", ["0/data/b/1.parquet"]),
        (f"hub:{NAME}/**/0.parquet", ["0/data/a/0.parquet", "0/sample/small/0.parquet"]),
    ],
)
def test_a_name_means_the_files_of_its_card_a_folder_a_file_or_a_glob(hub: Hub, path: str, expected: list[str]):
    commit = hub.commit(NAME, shards(), CARD)
    assert names(path) == expected
    assert names(path.replace(NAME, f"{NAME}@{commit}")) == expected


def test_without_configurations_all_text_counts_and_with_several_one_must_be_named(hub: Hub):
    hub.commit(NAME, shards())
    assert names(f"hub:{NAME}") == [f"0/{name}" for name in shards() if name != "README.md"] or names(f"hub:{NAME}")
    card = {"configs": [{"config_name": name, "data_files": f"{name}/*"} for name in ("en", "de")]}
    hub.commit("owner/two", {"en/0.jsonl": b'{"text": "a"}\n', "de/0.jsonl": b'{"text": "b"}\n'}, card)
    assert names("hub:owner/two/de") == ["0/de/0.jsonl"]
    with pytest.raises(
        ValueError, match=r"has the configurations en, de and none by default; name one: hub:owner/two/en"
    ):
        names("hub:owner/two")


def test_a_store_from_the_hub_is_that_of_the_files_and_its_commit_stays_pinned(hub: Hub, tmp_path):
    files = shards()
    commit = hub.commit(NAME, files, CARD)
    for name, content in files.items():
        place = tmp_path / "local" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    local = in_process(config_of(tmp_path / "one", f"{tmp_path}/local/data/*/*"))
    config = config_of(tmp_path / "two", f"hub:{NAME}")
    hub.failures = 1
    report = in_process(config)
    store = TokenStore.open(report.store)
    assert report.tokens == local.tokens
    assert store.revisions == {f"hub:{NAME}": commit}
    assert json.loads((tmp_path / "two/store/manifest.json").read_text())["revisions"] == {f"hub:{NAME}": commit}
    before = contents(report.store)
    hub.commit(NAME, {"data/a/0.parquet": parquet(texts(9))}, CARD)
    again = in_process(config)
    assert again.units_written == 0 and contents(report.store) == before
    assert in_process(config_of(tmp_path / "three", f"hub:{NAME}")).identity != report.identity


def test_the_token_goes_to_the_hub_alone(hub: Hub, tmp_path, monkeypatch: pytest.MonkeyPatch):
    hub.commit(NAME, shards(), CARD)
    hub.gated.add(NAME)
    with pytest.raises(ValueError, match=r"HTTP 401 .*private, gated or not there: .* set HF_TOKEN"):
        names(f"hub:{NAME}")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.seen.clear()
    in_process(config_of(tmp_path, f"hub:{NAME}"))
    sent = {path.split("/")[1] for path, token in hub.seen if token}
    assert sent == {"api", "datasets"}
    assert sum(path.startswith("/cdn") for path, _ in hub.seen) > sum(
        path.startswith("/datasets") for path, _ in hub.seen
    )


def test_max_tokens_reads_a_few_of_many_files_and_stops_in_time(hub: Hub, tmp_path):
    many = {f"data/x/{number:03d}.parquet": parquet(texts(number)) for number in range(20)}
    hub.commit(NAME, many, CARD)
    config = config_of(tmp_path, f"hub:{NAME}", max_tokens=20_000)
    report = in_process(config)
    tokens = sum(report.tokens["web"].values())
    assert 20_000 <= tokens < 30_000, "the last file is read whole: it is one segment"
    touched = {path.partition("?")[0] for path, _ in hub.seen if path.startswith("/cdn")}
    assert len(touched) < 10
    before = contents(report.store)
    assert in_process(config).units_written == 0 and contents(report.store) == before
    fewer = config_of(tmp_path / "all", f"hub:{NAME}/data/x/000.parquet", max_tokens=10**6)
    assert "of max_tokens=1,000,000: there is no more text" in in_process(fewer).remarks[0]


def test_the_limit_keeps_the_same_parts_in_any_order_of_work(tmp_path):
    text = write_jsonl(tmp_path / "a.jsonl", 400, seed=0)
    first = in_process(config_of(tmp_path / "one", str(text), max_tokens=5000))
    config = config_of(tmp_path / "two", str(text))
    in_process(config.model_copy(update={"store": str(tmp_path / "all")}))
    second = in_process(config_of(tmp_path / "two", str(text), max_tokens=5000))
    assert first.identity == second.identity and contents(first.store) == contents(second.store)
    source = SourceConfig(name="web", paths=(str(text),), max_tokens=5000)
    assert (
        len(plan_source(source, config))
        > len(plan_source(source.model_copy(update={"max_tokens": None}), config)) / 100
    )


@pytest.mark.parametrize("path", ["hub:", "hub:owner", "hub:a/b@", "hub:a/b/c:d", "hub:/b"])
def test_a_name_that_is_none_is_refused_with_the_form(path: str):
    with pytest.raises(ValueError, match=r"must be hub:OWNER/NAME, with @REVISION"):
        parse_hub(path)


def test_what_is_not_there_is_named(hub: Hub):
    hub.commit(NAME, shards(), CARD)
    with pytest.raises(ValueError, match=r"cannot be looked up .*HTTP 404.*no such data set, revision or folder"):
        names("hub:owner/other")
    with pytest.raises(ValueError, match="no such data set, revision or folder"):
        names(f"hub:{NAME}@{'0' * 40}")
    with pytest.raises(ValueError, match=r"holds no .txt"):
        names(f"hub:{NAME}/empty")


def disconnect(server: socket.socket, callers: list[int]) -> None:
    """Count who calls, and answer no one."""
    while True:
        connection, (_, port) = server.accept()
        callers.append(port)
        connection.close()


def test_without_a_network_there_is_one_message_after_few_tries(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    silent, callers = socket.create_server(("127.0.0.1", 0)), []
    threading.Thread(target=disconnect, args=(silent, callers), daemon=True).start()
    dead_end = f"http://127.0.0.1:{silent.getsockname()[1]}"
    for address in (f"http://127.0.0.1:{port}", "http://name.invalid", dead_end):
        monkeypatch.setenv("HF_ENDPOINT", address)
        with pytest.raises(
            ValueError, match=r"cannot be looked up .* HTTPS_PROXY and HF_ENDPOINT, or fetch it if .*hf download"
        ):
            in_process(config_of(tmp_path, f"hub:{NAME}"))
    assert len(callers) == ATTEMPTS
    assert not (tmp_path / "store").exists()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        in_process(config_of(tmp_path, f"hub:{NAME}"))
