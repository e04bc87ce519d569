"""Files behind https://: byte ranges, hiccups, files that change, servers without ranges."""

from __future__ import annotations

import gzip
from collections.abc import Iterator

import pytest

from amfm.data_pipeline.config import SourceConfig
from amfm.data_pipeline.prepare.documents import SegmentReader
from amfm.data_pipeline.prepare.records import Document
from amfm.data_pipeline.prepare.segments import cut_segments
from amfm.data_pipeline.prepare.sources import list_files
from amfm.data_pipeline.store.http_files import Answer, HttpError, HttpFile, ask
from tests.helpers.hub import Hub, hub_server
from tests.helpers.tiny_store import write_jsonl


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with hub_server() as hub:
        yield hub


def serve(server: Hub, name: str, content: bytes) -> str:
    commit = server.commit("files/here", {name: content})
    return f"{server.cdn}/cdn/files/here/{commit}/{name}?signature=secret"


def documents(path: str) -> list[Document]:
    (file,) = list_files(SourceConfig(name="web", paths=(path,)))
    segments = cut_segments(file, 700)
    return [item for segment in segments for item in SegmentReader(segment, "text") if isinstance(item, Document)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_file_behind_https_is_read_as_a_local_one(server: Hub, tmp_path, name: str):
    content = write_jsonl(tmp_path / "a.jsonl", 50, seed=0).read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    server.failures, server.cuts = 1, 1
    found = documents(serve(server, name, (tmp_path / name).read_bytes()))
    assert found == documents(str(tmp_path / name)) and len(found) == 50


def test_a_server_without_ranges_a_wrong_name_and_a_dead_address_are_refused_with_a_remedy(server: Hub):
    url = serve(server, "a.jsonl", b'{"text": "a"}\n')
    server.ranges = False
    assert len(ask(url, {"Range": "bytes=2-4"}, most_bytes=3).content) == 4, "no more of a whole file is read"
    with pytest.raises(ValueError, match="without byte ranges; download it and name the local file"):
        documents(url)
    server.ranges = True
    with pytest.raises(ValueError, match=r"must end in .txt, .md, .jsonl"):
        documents(serve(server, "a.zip", b"a"))
    with pytest.raises(ValueError, match=r"cannot be read .*; check the address, the network and HTTPS_PROXY"):
        documents("http://127.0.0.1:9/a.jsonl")
    with pytest.raises(ValueError) as caught:
        documents(f"{server.endpoint}/datasets/files/none/resolve/main/a.jsonl?signature=secret")
    assert "HTTP 404" in str(caught.value) and caught.value.__cause__ is not None
    assert "secret" not in str(caught.value.__cause__)


@pytest.mark.parametrize("content", [b"<html>Sign in</html>", b"[" * 200_000])
def test_an_answer_that_is_no_json_is_one_error_with_its_address(content: bytes):
    with pytest.raises(HttpError, match="answered with something else than JSON"):
        Answer(content, {}, "https://hub.example/api").json()


def test_a_file_that_changed_since_the_plan_is_an_error(server: Hub):
    url = serve(server, "a.jsonl", b"0123456789")
    assert HttpFile.stat(url).open().read() == b"0123456789"
    with pytest.raises(HttpError, match="it changed since it was planned"):
        HttpFile(url, 9).open().read()
    (file,) = list_files(SourceConfig(name="web", paths=(url,)))
    (other,) = list_files(SourceConfig(name="web", paths=(serve(server, "a.jsonl", b"9876543210"),)))
    assert file.num_bytes == other.num_bytes and file.modified_ns != other.modified_ns
