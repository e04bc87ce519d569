"""A server that strangers reach: all are answered, few at once, and no head is read in two ways."""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http import HTTPStatus

import pytest
from amfm_serve import http_server
from amfm_serve.http_server import HttpHandler, HttpServer

from tests.helpers.patience import PATIENCE_SECONDS

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Answering(HttpHandler):
    """Answers with the path; `/slow` when the test says so."""

    may_answer = threading.Event()

    def do_GET(self) -> None:
        self.server.has_come(self.connection)
        path = self.accept()
        if path is not None:
            if path == "/slow":
                self.may_answer.wait(PATIENCE_SECONDS)
            self.send_json(HTTPStatus.OK, path)


@pytest.fixture
def server() -> Iterator[HttpServer]:
    Answering.may_answer.clear()
    with HttpServer("127.0.0.1", 0, Answering) as started:
        thread = threading.Thread(target=started.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield started
        finally:
            Answering.may_answer.set()
            started.shutdown()
            thread.join()


def connect(server: HttpServer, stack: ExitStack, number: int) -> list[socket.socket]:
    address = ("127.0.0.1", server.server_address[1])
    return [stack.enter_context(socket.create_connection(address, timeout=PATIENCE_SECONDS)) for _ in range(number)]


def read_all(connection: socket.socket) -> str:
    return b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode()


def test_200_clients_at_once_are_all_answered(server: HttpServer) -> None:
    with ExitStack() as stack:
        clients = connect(server, stack, 200)
        for client in clients:
            client.sendall(HEALTH.replace(b"/health", b"/slow"))
        while server._connections + len(server._waiting) < 200:
            time.sleep(0.01)
        assert server._connections == http_server.MAX_CONNECTIONS
        Answering.may_answer.set()
        for client in clients:
            client.sendall(HEALTH)  # of those that keep their connection: those in whose place another waited do not
            client.shutdown(socket.SHUT_WR)
        said = [read_all(client) for client in clients]
    assert all(text.startswith("HTTP/1.1 200 ") and '"/slow"' in text for text in said)
    assert any("Connection: close" in text for text in said)
    while server._connections:
        time.sleep(0.01)


def test_connections_have_a_number_and_an_end(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "READ_SECONDS", PATIENCE_SECONDS)
    monkeypatch.setattr(http_server, "MAX_WAITING", 20)
    with ExitStack() as stack:
        # Each sends a part of a request, and no more; a byte now and then would not help it.
        silent = connect(server, stack, 100)
        for client in silent:
            client.sendall(HEALTH[:-2])
        while (
            len(answered := select.select(silent, [], [], PATIENCE_SECONDS)[0]) < 100 - http_server.MAX_CONNECTIONS - 20
        ):
            time.sleep(0.01)
        while len(server._deadlines) < http_server.MAX_CONNECTIONS:
            time.sleep(0.01)
        assert len(server._waiting) == 20
        monkeypatch.setattr(http_server, "READ_SECONDS", -1.0)  # the time of all is over
        server._deadlines.update(dict.fromkeys(server._deadlines, 0.0))
        said = {client: read_all(client) for client in silent}
    refused = [text for text in said.values() if text]
    assert [client for client, text in said.items() if text] == answered
    for text in refused:
        head, _, body = text.partition("\r\n\r\n")
        assert head.startswith("HTTP/1.1 503 ") and "Retry-After: 1" in head.split("\r\n")
        assert json.loads(body)["error"]["message"] == "too many clients at once; try again"
    while server._connections or server._refused:
        time.sleep(0.01)


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length : 50",
        b"Content-Length\t: 50",
        b"\x0bContent-Length: 50",
        b"X: a\r\n Content-Length: 50",
        b"X: a\r\n\tb",
        b" Content-Length: 50",
        b"Content Length: 50",
        b"Content-Length",
        b": 50",
        b"X: a\rContent-Length: 50",
        b"X: a\0b",
    ],
)
def test_a_head_that_programs_read_differently_is_refused_and_its_body_is_no_request(
    server: HttpServer, head: bytes
) -> None:
    Answering.may_answer.set()
    with ExitStack() as stack:
        (client,) = connect(server, stack, 1)
        client.sendall(b"GET /one HTTP/1.1\r\nHost: localhost\r\n" + head + b"\r\n\r\n" + HEALTH)
        said = read_all(client)
    assert said.count("HTTP/1.1 ") == 1 and "/health" not in said
    assert said.startswith("HTTP/1.1 400 ") or b"\rContent-Length" in head, said  # a length that is seen ends it, too


@pytest.mark.parametrize("address", [b"http://[", b"http://a]b/", b"//[/"])
def test_an_address_that_is_none_is_an_answer(
    server: HttpServer, address: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as stack:
        (client,) = connect(server, stack, 1)
        client.sendall(b"GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % address)
        said = read_all(client)
    assert said.startswith(("HTTP/1.1 400 ", "HTTP/1.1 200 ")[address == b"//[/" :])
    assert capfd.readouterr().err == ""


def test_this_machine_s_name_is_a_host_and_another_one_is_not(server: HttpServer) -> None:
    for host in ("localhost:1", "127.0.0.1", "[::1]:80", socket.gethostname(), socket.gethostname().upper() + ":9"):
        assert server.is_ours(host), host
    for host in ("", "evil.example", socket.gethostname() + ".evil.example", "localhost.evil.example", "[", "a]b"):
        assert not server.is_ours(host), host
