"""An HTTP server in front of another one that kills a process when its request of a chosen number arrives."""

from __future__ import annotations

import http.client
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class Gate:
    """Requests pass and are counted; the one of number `fatal` kills process `victim` before anyone sees it."""

    def __init__(self) -> None:
        self.count, self.fatal, self.victim = 0, -1, 0
        self.lock = threading.Lock()

    def let_pass(self) -> bool:
        with self.lock:
            number, self.count = self.count, self.count + 1
        if number < self.fatal or self.fatal < 0:
            return True
        with suppress(ProcessLookupError):
            os.kill(self.victim, signal.SIGKILL)
        return False


@contextmanager
def killing_proxy(endpoint: str) -> Iterator[tuple[str, Gate]]:
    """(endpoint of the proxy, its gate) before the server at `endpoint`."""
    gate, server = Gate(), urlsplit(endpoint)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if not gate.let_pass():
                self.close_connection = True
                return
            connection = http.client.HTTPConnection(server.hostname or "", server.port)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length", "server", "date"):
                    self.send_header(name, value)
            size = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", size or "0")
            self.end_headers()
            with suppress(ConnectionError):
                self.wfile.write(content)
            connection.close()

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

        def log_message(self, *_: object) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{proxy.server_port}", gate
    finally:
        proxy.shutdown()
