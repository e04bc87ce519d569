"""An S3 server on this machine that speaks real HTTP, and a record of what it was asked for."""

from __future__ import annotations

import logging
import re
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import obstore
from obstore.store import from_url

BUCKET = "texts"


class Requests(logging.Handler):
    """Methods and paths of the requests, in order, as the server logs them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        found = re.search(r'"(?:\x1b\[[\d;]*m)*([A-Z]+) (\S+) HTTP', record.getMessage())
        if found:
            self.seen.append((found[1], found[2]))

    def gets(self, inside: str) -> int:
        """Requests of objects whose path holds a text."""
        return sum(method == "GET" and inside in path for method, path in self.seen)


@contextmanager
def s3_server() -> Iterator[tuple[dict[str, str], Requests]]:
    """(environment variables for its clients, record of requests) of a server with one empty bucket."""
    from moto.server import ThreadedMotoServer  # a second of imports, which the collection of tests needs not

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    requests, logger = Requests(), logging.getLogger("werkzeug")
    logger.addHandler(requests)
    logger.setLevel(logging.INFO)
    endpoint = f"http://{host}:{port}"
    try:
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT"))
        yield (
            {
                "AWS_ENDPOINT_URL": endpoint,
                "AWS_ALLOW_HTTP": "true",
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_REGION": "us-east-1",
            },
            requests,
        )
    finally:
        logger.removeHandler(requests)
        server.stop()


def upload(folder: str | Path, url: str) -> None:
    """Copy all files below a folder."""
    client = from_url(url)
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            obstore.put(client, path.relative_to(folder).as_posix(), path.read_bytes())
