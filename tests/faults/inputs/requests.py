"""Raw requests to a server that must answer each, or end its connection: no 500, no traceback, and the next one is answered."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

SEED = 52
ODD = (
    "null",
    "[]",
    "{}",
    '""',
    "-1",
    "0",
    "1e400",
    "true",
    '"x"',
    "[[]]",
    "9" * 400,
    "NaN",
    '{"a": 1}',
    '"\\ud800"',
    "1.5",
)
FIELDS = (
    "prompt",
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "stop",
    "stream",
    "seed",
    "n",
    "messages",
    "echo",
    "\\u0000",
)
METHODS = (
    "GET",
    "POST",
    "PUT",
    "DELETE",
    "HEAD",
    "OPTIONS",
    "TRACE",
    "CONNECT",
    "PATCH",
    "get",
    "G\0T",
    "",
    "X" * 70_000,
)
PATHS = ("/", "/health", "/v1/models", "/v1/models/..", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/\\..\\", "http://[", "http://a]b/", "*", "/" + "x" * 70_000, "/v1/models/small?x=1", "/?", "/#", "/%", "/%00", "/é", "?", "http://evil.example/")  # fmt: skip
HOSTS = ("", "evil.example", "localhost", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:99999", "127.0.0.1.evil.example", "evil@127.0.0.1", "127.0.0.1@evil", "[::1]", "[::1", "0", "2130706433", "127.1", "localhost.", "LOCALHOST", "a b", "a\tb", "\x00", "x" * 5000)  # fmt: skip
HEADERS = (
    *("Content-Length: -1", "Content-Length: x", "Content-Length: 1, 1", "Content-Length: +1", "Content-Length: 0x1", "Content-Length : 5"),
    *("Content-Length: 5\r\nContent-Length: 6", "Transfer-Encoding: chunked", "Transfer-Encoding: xchunked", "Transfer-Encoding : chunked"),
    *("Transfer-Encoding: identity, chunked", "Content-Length: 99999999999", " Folded: x", "X: y\r\n folded", "NoColon", ": empty", "X:\0"),
    *("X: \xff\xfe", "X: " + "y" * 70_000, "Expect: 100-continue", "Connection: upgrade\r\nUpgrade: websocket", "Connection: keep-alive, close"),
)  # fmt: skip
VERSIONS = ("HTTP/0.9", "HTTP/1.0", "HTTP/2.0", "HTTP/1.1.1", "HTTP/x", "", "HTTP/1.1 x", "RTSP/1.0")
BODIES = (b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"\0", b"[" * 100_000, b'{"prompt": ' * 5000, b"{}" * 100, b'{"prompt": "x"', b'{"prompt": "x", "prompt": "y"}', b"\xef\xbb\xbf{}")  # fmt: skip


def post(body: bytes, host: str = "127.0.0.1", path: str = "/v1/completions", more: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n{more}Content-Length: {len(body)}\r\n\r\n"
    return head.encode("latin-1", "replace") + body


def requests() -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each."""
    for method in METHODS:
        yield f"method {method[:10]!r}", f"{method} / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    for path in PATHS:
        for method in ("GET", "POST"):
            yield (
                f"{method} {path[:30]!r}",
                f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n".encode(),
            )
    for host in HOSTS:
        yield f"host {host[:30]!r}", f"GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    for header in HEADERS:
        body = b'{"prompt": "x", "max_tokens": 1}'
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{header}\r\n\r\n"
        yield f"header {header[:40]!r}", head.encode("latin-1") + body
    for version in VERSIONS:
        yield f"version {version!r}", f"GET /health {version}\r\nHost: 127.0.0.1\r\n\r\n".encode()
    for body in BODIES:
        yield f"body {body[:20]!r}", post(body)
        yield f"chat body {body[:20]!r}", post(body, path="/v1/chat/completions")
    for field in FIELDS:
        for value in random.Random(field).sample(ODD, 8):
            prompt = "" if field == "prompt" else '"prompt": "x", '
            limit = "" if field == "max_tokens" else '"max_tokens": 1, '
            yield f"{field}={value[:20]}", post(f'{{{prompt}{limit}"{field}": {value}}}'.encode())
    sound = post(json.dumps({"prompt": "x", "max_tokens": 1}).encode())
    for cut in (0, 1, 3, 10, 40, len(sound) - 40, len(sound) - 1):
        yield f"cut at {cut}", sound[:cut]
    draw = random.Random(SEED)
    for number in range(40):
        mutated = bytearray(sound)
        for _ in range(draw.choice((1, 2, 8))):
            mutated[draw.randrange(len(mutated))] = draw.randrange(256)
        yield f"mutation {number}", bytes(mutated)
