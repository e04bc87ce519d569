"""A web server on this machine that speaks the Hub's API for data sets, with ranges, pages, redirects and a token."""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PAGE = 2  # entries of a tree that an answer holds


@dataclass
class Hub:
    """Data sets by name: commits in order, each files by name. `gated`: needs the token. `seen`: requests in order.

    Bytes come from `cdn`, the same server under another host name. `ranges`: false for a server that ignores them.
    `failures`: this many requests of bytes get 503 first; `cuts`: this many after them end in the middle of their bytes.
    """

    port: int = 0
    commits: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)
    cards: dict[str, dict[str, Any]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    token: str = "hf_secret"
    ranges: bool = True
    failures: int = 0
    cuts: int = 0
    seen: list[tuple[str, str | None]] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT says."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def cdn(self) -> str:
        """Another host, to which the token must not go."""
        return f"http://localhost:{self.port}"

    def commit(self, repository: str, files: dict[str, bytes], card: dict[str, Any] | None = None) -> str:
        """Add a commit and return its number."""
        self.commits.setdefault(repository, []).append(files)
        self.cards[repository] = card or {}
        return self.number(repository, -1)

    def number(self, repository: str, index: int) -> str:
        """The commit's number: a digest of its files."""
        facts = [
            repository,
            {name: hashlib.sha1(content).hexdigest() for name, content in self.commits[repository][index].items()},
        ]
        return hashlib.sha1(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def find(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit of a revision: `main`, or a number."""
        known = {self.number(repository, index): files for index, files in enumerate(self.commits.get(repository, ()))}
        if revision == "main" and known:
            revision = list(known)[-1]
        return (revision, known[revision]) if revision in known else None


class Handler(BaseHTTPRequestHandler):
    """Answers as the Hub does; `hub` is set on a subclass."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Report nothing."""

    def do_GET(self) -> None:
        """Route a request."""
        hub = self.hub
        parts = urllib.parse.urlsplit(self.path)
        words = [urllib.parse.unquote(word) for word in parts.path.strip("/").split("/")]
        hub.seen.append((self.path, self.headers.get("Authorization")))
        if words[0] == "cdn":
            self.send_bytes(hub.find("/".join(words[1:3]), words[3])[1]["/".join(words[4:])])  # type: ignore[index]
            return
        repository = "/".join(words[2:4] if words[0] == "api" else words[1:3])
        revision = words[5] if words[0] == "api" else words[4]
        if repository in hub.gated and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.answer(401, b"{}")
            return
        found = hub.find(repository, revision)
        if found is None:
            self.answer(404, b"{}")
        elif words[0] == "datasets":
            name = "/".join(words[5:])
            self.answer(
                302, b"", {"Location": f"{hub.cdn}/cdn/{repository}/{revision}/{urllib.parse.quote(name)}?signed=1"}
            )
        elif words[4] == "revision":
            self.answer(
                200, json.dumps({"id": repository, "sha": found[0], "cardData": hub.cards[repository]}).encode()
            )
        else:
            self.send_tree(found[1], "/".join(words[6:]), parts)

    def send_tree(self, files: dict[str, bytes], root: str, parts: urllib.parse.SplitResult) -> None:
        """A page of the files below a folder."""
        names = sorted(name for name in files if not root or name.startswith(f"{root}/"))
        start = int(urllib.parse.parse_qs(parts.query).get("cursor", ["0"])[0])
        entries = [
            {"type": "file", "path": name, "size": len(files[name]), "oid": hashlib.sha1(files[name]).hexdigest()}
            for name in names[start : start + PAGE]
        ]
        entries += [{"type": "directory", "path": "folder", "size": 0, "oid": "0" * 40}] if start == 0 else []
        more = {}
        if start + PAGE < len(names):
            more = {"Link": f'<{self.hub.endpoint}{parts.path}?recursive=true&cursor={start + PAGE}>; rel="next"'}
        self.answer(200, json.dumps(entries).encode(), more)

    def send_bytes(self, content: bytes) -> None:
        """A file, or the range of it that is asked for."""
        hub, asked = self.hub, self.headers.get("Range")
        if hub.failures:
            hub.failures -= 1
            self.answer(503, b"later")
        elif asked is None or not hub.ranges:
            self.answer(200, content)
        else:
            first, last = asked.removeprefix("bytes=").split("-")
            stop = min(int(last) + 1, len(content))
            place = {
                "Content-Range": f"bytes {first}-{stop - 1}/{len(content)}",
                "ETag": hashlib.sha1(content).hexdigest(),
            }
            if hub.cuts and stop - int(first) > 1:
                hub.cuts -= 1
                self.send_response(206)
                for name, value in {**place, "Content-Length": str(stop - int(first))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content[int(first) : (int(first) + stop) // 2])
                self.close_connection = True
                return
            self.answer(206, content[int(first) : stop], place)

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        """Send an answer."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def hub_server() -> Iterator[Hub]:
    """An empty Hub that answers until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
