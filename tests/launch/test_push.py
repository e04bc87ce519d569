"""`amfm export --push` makes one commit of all files in a repository of the Hub's API, and says in words what the Hub rejects."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from amfm.launch.cli import run

pytest.importorskip("huggingface_hub")


class Uploads(ThreadingHTTPServer):
    """A server that speaks the part of the Hub's API by which a folder is sent; `files`: of the last commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.deleted: list[str] = []
        self.summary = ""
        self.fails = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Uploads
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def content(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self) -> None:
        names = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in self.server.files]
        is_tree = "/tree/" in self.path
        known = {"id": "team/model", "sha": "1" * 40, "siblings": [{"rfilename": name} for name in self.server.files]}
        self.answer(200, names if is_tree else known)

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self.content()
        self.answer(200, {})

    def do_POST(self) -> None:
        content = self.content()
        if self.headers.get("Authorization") != "Bearer hf_right":
            self.answer(401, {"error": "Invalid credentials"})
        elif self.path == "/api/repos/create":
            asked = json.loads(content)
            name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            self.server.repositories[name] = bool(asked.get("private") or asked.get("visibility") == "private")
            self.answer(200, {"url": f"{self.server.address}/{name}"})
        elif self.server.fails:
            self.answer(422, {"error": "no room"})
        elif "/preupload/" in self.path:
            files = [
                {
                    "path": file["path"],
                    "shouldIgnore": False,
                    "uploadMode": "lfs" if "safetensors" in file["path"] else "regular",
                }
                for file in json.loads(content)["files"]
            ]
            self.answer(200, {"files": files})
        elif self.path.endswith("/objects/batch"):
            found = json.loads(content)["objects"]
            upload = [
                {**each, "actions": {"upload": {"href": f"{self.server.address}/lfs/{each['oid']}"}}} for each in found
            ]
            self.answer(200, {"transfer": "basic", "objects": upload})
        else:
            assert "/commit/" in self.path
            self.commit([json.loads(line) for line in content.splitlines() if line.strip()])
            self.answer(
                200, {"commitUrl": f"{self.server.address}/team/model/commit/{'1' * 40}", "commitOid": "1" * 40}
            )

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                self.server.deleted.append(value["path"])
            elif line["key"] == "header":
                self.server.summary = value["summary"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Uploads]:
    """The server, as `HF_ENDPOINT` names it; read when huggingface_hub was imported, so set there too."""
    from huggingface_hub import constants, hf_api

    server = Uploads()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(hf_api, "ENDPOINT", server.address, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield server
    server.shutdown()
    server.server_close()


def make_export(folder: Path) -> dict[str, bytes]:
    files = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 9, "tokenizer.json": b"[1]"}
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return files


def test_an_export_that_exists_is_sent_as_one_commit_and_older_weights_go(
    hub: Uploads, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = make_export(tmp_path / "mine")
    hub.files = {"model-00001-of-00002.safetensors": b"old"}
    assert run(["export", str(tmp_path / "mine"), "--push", "team/model", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"path": str(tmp_path / "mine"), "pushed": f"{hub.address}/team/model/commit/{'1' * 40}"}
    assert hub.repositories == {"team/model": True} and hub.summary == "amfm export mine"
    assert {name: hub.files[name] for name in files} == files
    assert hub.deleted == ["model-00001-of-00002.safetensors"]
    assert list(hub.objects) == [hashlib.sha256(files["model.safetensors"]).hexdigest()]


@pytest.mark.parametrize(
    ("name", "token", "fails", "code", "message"),
    [
        ("model", "hf_right", False, 2, "--push model must be OWNER/NAME, such as my-team/tiny-cpu"),
        ("team/model", "hf_wrong", False, 2, "set HF_TOKEN to a token that may write there"),
        ("team/model", "hf_right", True, 3, "send it again by amfm export"),
    ],
)
def test_what_the_hub_refuses_is_one_message(
    hub: Uploads,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    token: str,
    fails: bool,
    code: int,
    message: str,
) -> None:
    make_export(tmp_path / "mine")
    monkeypatch.setenv("HF_TOKEN", token)
    hub.fails = fails
    assert run(["export", str(tmp_path / "mine"), "--push", name]) == code
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == "" and "Traceback" not in captured.err


def test_only_an_export_for_transformers_is_sent(
    hub: Uploads, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    assert run(["export", str(tmp_path / "run"), "--push", "team/model"]) == 2
    assert run(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "dcp", "--push", "team/model"]) == 2
    assert "--push sends an export for transformers" in capsys.readouterr().err
    assert hub.files == {}
