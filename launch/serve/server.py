"""The HTTP server: completions, chat completions, the list of models, a page to try them, on one address.

Python's own server is enough: a handful of clients of one machine share one model, whose arithmetic takes all the time,
and a web framework would be the largest dependency of this package. It speaks plain HTTP and asks no one who he is, so
it listens on loopback unless told otherwise. A web page of someone else must not reach it through a reader's browser:
requests name this host (a name that an attacker points here does not), and bodies must be JSON, which no browser sends
across origins without asking first; that question is never answered. A refused request ends its connection: what follows
on it may be the refused one's body, which must not be taken for another request. Connections are counted, and a request
must have arrived within READ_SECONDS, so that who connects and says nothing takes no one's place for long.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import socket
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from amfm.launch.serve.answers import begin_answer
from amfm.launch.serve.requests import Kind, RefusedError, parse_request
from amfm.launch.serve.served_model import ServedModel

MAX_BODY_BYTES = 4 << 20
MAX_BODY_DIGITS = 10
MAX_CONNECTIONS = 64
READ_SECONDS = 60.0  # for a request to come, whole, after the connection or the request before it
WRITE_SECONDS = 60.0  # for a client to take the next piece of its answer
DRAIN_SECONDS = 1.0  # for what a refused client still sends: closed before it is read, it would take the answer along
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'"
KINDS: dict[str, Kind] = {"/v1/completions": "completion", "/v1/chat/completions": "chat"}


class ModelServer(ThreadingHTTPServer):
    """Listens at once; answers when `serve_forever` runs. `model` is given before that. Raises ValueError for a busy port."""

    daemon_threads = True
    request_queue_size = 128
    model: ServedModel
    max_tokens: int

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._deadlines: dict[socket.socket, float] = {}
        try:
            self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            super().__init__((host, port), Handler)
        except OSError as error:
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"can't be had: {error.strerror}"
            raise ValueError(f"port {port} of {host} {reason}; give another one by --port, or 0 for any") from error

    @property
    def url(self) -> str:
        """Where the server is reached."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_address[1]}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection its thread, where there is room for one more; else say so and end it."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        with suppress(OSError):
            request.setblocking(False)
            request.send(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        request.close()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._deadlines.pop(request, None)
            self._free.release()

    def shutdown_request(self, request: Any) -> None:
        """End a connection after what the client still sends of a refused request has been read, a second at most."""
        with suppress(OSError):
            request.shutdown(socket.SHUT_WR)
            request.settimeout(DRAIN_SECONDS)
            deadline = time.monotonic() + DRAIN_SECONDS
            while request.recv(1 << 16) and time.monotonic() < deadline:
                pass
        self.close_request(request)

    def expect(self, request: socket.socket) -> None:
        """Note that a request must arrive on this connection within READ_SECONDS."""
        self._deadlines[request] = time.monotonic() + READ_SECONDS

    def has_come(self, request: socket.socket) -> None:
        """Note that it has."""
        self._deadlines.pop(request, None)

    def service_actions(self) -> None:
        """End the connections whose time is over; `serve_forever` calls this twice a second."""
        now = time.monotonic()
        for request, deadline in list(self._deadlines.items()):
            if now > deadline:
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def page(self) -> str:
        """The page to try the model on."""
        facts = json.dumps({"model": self.model.name, "chat": self.model.template is not None})
        page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        return page.replace("__FACTS__", facts.replace("<", "\\u003c"))

    def is_ours(self, host: str) -> bool:
        """Whether a request's Host names this server: an address, localhost, or the name it was told to listen on."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in ("localhost", self.host.lower()):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: ModelServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "amfm", ""
    timeout = max(READ_SECONDS, WRITE_SECONDS)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: prompts are private."""

    def handle_one_request(self) -> None:
        """Read a request and answer it."""
        self.server.expect(self.connection)
        try:
            super().handle_one_request()
        except ConnectionError:  # it went away, or its time was over
            self.close_connection = True

    def do_GET(self) -> None:
        """Answer the page, the list of models, and whether the server is there."""
        path = urlsplit(self.path).path
        self.server.has_come(self.connection)
        if not self._is_for_us():
            return
        if {"content-length", "transfer-encoding"} & {name.lower() for name in self.headers}:
            self.close_connection = True  # a body is not read
        model = self.server.model
        if path == "/":
            self._send(HTTPStatus.OK, self.server.page().encode(), "text/html; charset=utf-8")
        elif path in ("/v1/models", f"/v1/models/{model.name}"):
            entry = {"id": model.name, "object": "model", "created": 0, "owned_by": "amfm"}
            self._send_json(HTTPStatus.OK, {"object": "list", "data": [entry]} if path == "/v1/models" else entry)
        elif path == "/health":
            self._send_json(HTTPStatus.OK, {"status": "ok"})
        else:
            self._refuse(RefusedError(f"no such endpoint: {path:.100}; see /v1/models", status=404))

    def do_POST(self) -> None:
        """Answer a completion, whole or as a stream of server-sent events."""
        if not self._is_for_us():
            return
        kind = KINDS.get(urlsplit(self.path).path)
        if kind is None:
            self._refuse(RefusedError(f"no such endpoint: {self.path:.100}; see {', '.join(KINDS)}", status=404))
            return
        try:
            body = self._read_body()
            self.server.has_come(self.connection)
            request = parse_request(kind, body, self.server.model.name)
            answer = begin_answer(request, self.server.model, self.server.max_tokens)
        except RefusedError as refusal:
            self._refuse(refusal)
            return
        try:
            if request.is_stream:
                self._stream(answer.chunks())
            else:
                self._send_json(HTTPStatus.OK, answer.whole())
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # the client went away: generation has stopped with it
        except RuntimeError as error:
            if request.is_stream:  # its answer has begun: it ends in the middle, which a client sees
                self.close_connection = True
            else:
                self._refuse(RefusedError(f"the model failed: {error}", status=500))

    def _is_for_us(self) -> bool:
        """Whether the request names this host; refuses it otherwise."""
        hosts = self.headers.get_all("Host") or []
        if len(hosts) == 1 and self.server.is_ours(hosts[0]):
            return True
        self._refuse(RefusedError("the Host header names another host; use the address of this server", status=403))
        return False

    def _read_body(self) -> dict[str, Any]:
        if self.headers.get_content_type() != "application/json":
            raise RefusedError("the body must be JSON, with Content-Type: application/json", status=415)
        lengths = self.headers.get_all("Content-Length") or [""]
        length = lengths[0]
        is_known = len(lengths) == 1 and "Transfer-Encoding" not in self.headers
        is_number = length.isascii() and length.isdecimal() and len(length) <= MAX_BODY_DIGITS
        if not (is_known and is_number and int(length) <= MAX_BODY_BYTES):
            raise RefusedError(f"the body must have a Content-Length of at most {MAX_BODY_BYTES} bytes", status=413)
        try:
            body = json.loads(self.rfile.read(int(length)))
            json.dumps(body, ensure_ascii=False).encode()  # half of a character beyond 16 bits (as \\ud83d) is not text
        except (ValueError, RecursionError) as error:
            raise RefusedError(f"the body is not valid JSON: {error}") from error
        if not isinstance(body, dict):
            raise RefusedError("the body must be a JSON object")
        return body

    def _stream(self, chunks: Any) -> None:
        """Send objects as server-sent events, each when it is there; a client that is gone ends the generation."""
        self.send_response(HTTPStatus.OK)
        for name, value in (("Content-Type", "text/event-stream"), ("Cache-Control", "no-store"), ("Transfer-Encoding", "chunked")):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        try:
            for chunk in chunks:
                self._send_chunk(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode())
            self._send_chunk(b"data: [DONE]\n\n")
            self._send_chunk(b"")
        finally:
            chunks.close()

    def _send_chunk(self, content: bytes) -> None:
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
        self.wfile.flush()

    def _refuse(self, refusal: RefusedError) -> None:
        """Answer with the reason, and end the connection: a body that was not read is not a request."""
        self.close_connection = True
        kind = "invalid_request_error" if refusal.status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
        error = {"message": str(refusal), "type": kind, "param": refusal.key, "code": refusal.code}
        self._send_json(HTTPStatus(refusal.status), {"error": error})

    def _send_json(self, status: HTTPStatus, value: object) -> None:
        self._send(status, json.dumps(value, ensure_ascii=False).encode(), "application/json")

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)
