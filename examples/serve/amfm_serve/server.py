"""The server of a model: completions, chat completions, the list of models, a page to try them, on one address.

A handful of clients of one machine share one model, whose arithmetic takes all the time. Besides what `http_server.py` rejects,
bodies must be JSON, which no browser sends across origins without asking first; that question is never answered.
"""

from __future__ import annotations

import errno
import json
from http import HTTPStatus
from pathlib import Path
from typing import Any

from amfm_serve.completions import Kind, RefusedError, ServedModel, begin_answer, parse_request
from amfm_serve.http_server import HttpHandler, HttpServer

MAX_BODY_BYTES = 4 << 20
MAX_BODY_DIGITS = 10
KINDS: dict[str, Kind] = {"/v1/completions": "completion", "/v1/chat/completions": "chat"}


class ModelServer(HttpServer):
    """Listens at once; answers when `serve_forever` runs. `model` is given before that. Raises ValueError for a busy port."""

    model: ServedModel
    max_tokens: int

    def __init__(self, host: str, port: int) -> None:
        try:
            super().__init__(host, port, Handler)
        except OSError as error:
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be had: {error.strerror}"
            raise ValueError(f"port {port} of {host} {reason}; give another one by --port, or 0 for any") from error

    def page(self) -> str:
        """The page to try the model on."""
        facts = json.dumps({"model": self.model.name, "chat": self.model.template is not None})
        page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        return page.replace("__FACTS__", facts.replace("<", "\\u003c"))


class Handler(HttpHandler):
    """One connection."""

    server: ModelServer

    def do_GET(self) -> None:
        """Answer the page, the list of models, and whether the server is there."""
        self.server.has_come(self.connection)
        path = self.accept()
        if path is None:
            return
        model = self.server.model
        if path == "/":
            self.send(HTTPStatus.OK, self.server.page().encode(), "text/html; charset=utf-8")
        elif path in ("/v1/models", f"/v1/models/{model.name}"):
            entry = {"id": model.name, "object": "model", "created": 0, "owned_by": "amfm"}
            self.send_json(HTTPStatus.OK, {"object": "list", "data": [entry]} if path == "/v1/models" else entry)
        elif path == "/health":
            self.send_json(HTTPStatus.OK, {"status": "ok"})
        else:
            self.refuse(HTTPStatus.NOT_FOUND, f"no such endpoint: {path:.100}; see /v1/models")

    def do_POST(self) -> None:
        """Answer a completion, whole or as a stream of server-sent events."""
        path = self.accept()
        if path is None:
            return
        kind = KINDS.get(path)
        if kind is None:
            self.refuse(HTTPStatus.NOT_FOUND, f"no such endpoint: {path:.100}; see {', '.join(KINDS)}")
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
                self.send_json(HTTPStatus.OK, answer.whole())
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # the client went away: generation has stopped with it
        except RuntimeError as error:
            if request.is_stream:  # its answer has begun: it ends in the middle, which a client sees
                self.close_connection = True
            else:
                self.refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"the model failed: {error}")

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
        kind = {"Content-Type": "text/event-stream", "Cache-Control": "no-store", "Transfer-Encoding": "chunked"}
        self.begin(HTTPStatus.OK, kind)
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
        self.refuse(refusal.status, str(refusal), param=refusal.key, code=refusal.code)
