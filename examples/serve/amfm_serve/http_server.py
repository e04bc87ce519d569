"""An HTTP server that strangers may reach: who may ask, how many at once, and for how long.

Python's own server is enough for a handful of clients; a web framework would be the largest dependency of this package. It
speaks plain HTTP and asks no one who he is, so its users listen on loopback unless told otherwise. A web page of someone
else must not reach it through a reader's browser: requests name this host, and a name that an attacker points here does
not. Python's parser forgives what other programs read differently, so a head with anything unusual is rejected: what
one of two reads as a body must not be the other's next request. For the same reason a rejected request ends its connection.

Connections are counted. Those beyond wait for their turn, and beyond these a client is asked to come again. A request
must have arrived within READ_SECONDS, so that who connects and says nothing takes no one's place for long.
"""

from __future__ import annotations

import ipaddress
import json
import re
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

MAX_CONNECTIONS = 64
MAX_WAITING = 256  # beyond the connections; with those that are rejected, fewer files than a process may open
MAX_REFUSED = 128  # that are kept open until their answer has been read
READ_SECONDS = 60.0  # for a request to come, whole, after the connection or the request before it
WRITE_SECONDS = 60.0  # for a client to take the next piece of its answer
DRAIN_SECONDS = 1.0  # for what a rejected client still sends: closed before it is read, it would take the answer along
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'"
TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # a name in a head: RFC 9110, section 5.6.2


class HttpServer(ThreadingHTTPServer):
    """Listens at once; answers when `serve_forever` runs. Raises OSError if the address cannot be had."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, handler: type[HttpHandler]) -> None:
        self.host = host
        self._names = {"localhost", host.lower(), socket.gethostname().lower()}
        self._lock = threading.Lock()
        self._connections = 0
        self._waiting: deque[tuple[socket.socket, Any]] = deque()
        self._refused: dict[socket.socket, float] = {}
        self._deadlines: dict[socket.socket, float] = {}
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        super().__init__((host, port), handler)

    @property
    def url(self) -> str:
        """Where the server is reached."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_address[1]}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection its thread, or let it wait for one; where too many wait, say so and end it."""
        with self._lock:
            is_full = self._connections >= MAX_CONNECTIONS
            if is_full and len(self._waiting) < MAX_WAITING:
                self._waiting.append((request, client_address))
                return
            self._connections += not is_full
        if is_full:
            self._send_away(request)
        else:
            super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection in its thread, then those that wait."""
        taken: tuple[Any, Any] | None = request, client_address
        while taken is not None:
            super().process_request_thread(*taken)
            self._deadlines.pop(taken[0], None)
            with self._lock:
                taken = self._waiting.popleft() if self._waiting else None
                self._connections -= taken is None

    @property
    def is_crowded(self) -> bool:
        """Whether connections wait: then none is kept for another request."""
        return bool(self._waiting)

    def _send_away(self, request: socket.socket) -> None:
        """Ask a client to come again. It is given time to read that, which costs no thread."""
        content = json.dumps(
            describe_error(HTTPStatus.SERVICE_UNAVAILABLE, "too many clients at once; try again")
        ).encode()
        head = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
        with suppress(OSError):
            request.setblocking(False)
            request.send(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            request.shutdown(socket.SHUT_WR)
        self._refused[request] = time.monotonic() + DRAIN_SECONDS
        if len(self._refused) > MAX_REFUSED:
            first = next(iter(self._refused))
            del self._refused[first]
            first.close()

    def shutdown_request(self, request: Any) -> None:
        """End a connection after what the client still sends of a rejected request has been read, a second at most."""
        with suppress(OSError):
            request.shutdown(socket.SHUT_WR)
            request.settimeout(DRAIN_SECONDS)
            deadline = time.monotonic() + DRAIN_SECONDS
            while request.recv(1 << 16) and time.monotonic() < deadline:
                pass
        self.close_request(request)

    def server_close(self) -> None:
        """Stop listening, and end the connections that no thread has."""
        super().server_close()
        for request in (*self._refused, *(request for request, _ in self._waiting)):
            request.close()

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
        for request in [request for request, deadline in self._refused.items() if now > deadline]:
            del self._refused[request]
            with suppress(OSError):
                request.recv(1 << 20)
            request.close()

    def is_ours(self, host: str) -> bool:
        """Whether a request's Host names this server: an address, localhost, this machine, or the name it was told to listen on."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class HttpHandler(BaseHTTPRequestHandler):
    """One connection."""

    server: HttpServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "amfm", ""
    timeout = max(READ_SECONDS, WRITE_SECONDS)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: what is asked is private, and scrapes come every few seconds."""

    def handle_one_request(self) -> None:
        """Read a request and answer it."""
        self.server.expect(self.connection)
        try:
            super().handle_one_request()
        except ConnectionError:  # it went away, or its time was over
            self.close_connection = True

    def accept(self) -> str | None:
        """The path of a request that is well formed and names this host; None after another one was rejected."""
        if not is_sound(self.headers):
            self.refuse(HTTPStatus.BAD_REQUEST, "the head of the request is malformed")
            return None
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not self.server.is_ours(hosts[0]):
            self.refuse(HTTPStatus.FORBIDDEN, "the Host header names another host; use the address of this server")
            return None
        if self.command == "GET" and {"content-length", "transfer-encoding"} & {name.lower() for name in self.headers}:
            self.close_connection = True  # a body is not read
        try:
            return urlsplit(self.path).path
        except ValueError:
            self.refuse(HTTPStatus.BAD_REQUEST, f"the address is malformed: {self.path:.100}")
            return None

    def refuse(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        """Answer with the reason, and end the connection: a body that was not read is not a request."""
        self.close_connection = True
        self.send_json(HTTPStatus(status), describe_error(status, message, param=param, code=code))

    def send_json(self, status: HTTPStatus, value: object) -> None:
        """Answer with a JSON value."""
        self.send(status, json.dumps(value, ensure_ascii=False).encode(), "application/json")

    def send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        """Answer with some bytes."""
        self.begin(
            status,
            {
                "Content-Type": kind,
                "Content-Length": str(len(content)),
                "Content-Security-Policy": POLICY,
                "X-Content-Type-Options": "nosniff",
            },
        )
        self.wfile.write(content)

    def begin(self, status: HTTPStatus, headers: dict[str, str]) -> None:
        """Send the head of an answer. The connection ends with it where others wait."""
        self.close_connection |= self.server.is_crowded
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()


def is_sound(head: Message) -> bool:
    """Whether a head is read by all programs in the same way: names that are names, a line a value, and nothing left over."""
    if head.defects or head.get_payload():  # `Content-Length : 5` ends the head, for Python
        return False
    return all(TOKEN.fullmatch(name) and not set("\r\n\0") & set(str(value)) for name, value in head.raw_items())


def describe_error(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
