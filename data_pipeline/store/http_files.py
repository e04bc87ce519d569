"""Files behind https://, read in byte ranges: what the Hub, mirrors and object stores with public links serve.

Python's own client does it: it takes proxies and certificates from where every program here takes them (HTTPS_PROXY,
SSL_CERT_FILE), and a range is one request. A redirect is followed once and then remembered, because hubs count requests
to their own address and send the bytes from another; a token goes to the host that it is for and never along with a
redirect to another one. Each answer is checked against the range that was asked for and to the size that the plan
knows, so a server that ignores ranges, or a file that was replaced meanwhile, is an error and no other text.
"""

from __future__ import annotations

import io
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from amfm.data_pipeline.store.object_store import RangeStream

SCHEMES = ("https", "http")
STREAM_BYTES = 4 * 2**20  # the least that one request of a file brings
TIMEOUT_SECONDS = 30.0  # of a connection, and of each wait for bytes
ATTEMPTS = 7  # a read of a long preparation outlives a hiccup of half a minute
FIRST_PAUSE_SECONDS = 0.5  # before asking again; twice as long each time
MOST_BYTES = 64 * 2**20  # of an answer that is not a range of a file, such as a page of a listing
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class HttpError(RuntimeError):
    """A request that failed for good. status: HTTP's number, None if there was no answer."""

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Answer:
    """An answer: its bytes, its headers by lower-case name, and the address that sent them."""

    content: bytes
    headers: Mapping[str, str]
    url: str

    def json(self) -> Any:
        """The content as JSON. Raises HttpError if it is none (a login page of a proxy, most often) or nested without end."""
        try:
            return json.loads(self.content)
        except (ValueError, RecursionError) as error:
            raise HttpError(f"{self.url} answered with something else than JSON") from error


class _SameHostSecrets(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and leaves the token behind where they lead to another host."""

    def redirect_request(self, request: Any, fp: Any, code: int, text: str, headers: Any, new_url: str) -> Any:
        following = super().redirect_request(request, fp, code, text, headers, new_url)
        if following is not None and origin(new_url) != origin(request.full_url):
            following.remove_header("Authorization")
        return following


def origin(url: str) -> tuple[str, str]:
    """Scheme and host with port of an address."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.netloc


def is_http(path: str) -> bool:
    """Whether a path of the configuration is an address of a web server."""
    return path.partition("://")[0] in SCHEMES


def ask(
    url: str,
    headers: Mapping[str, str] = {},
    *,
    attempts: int = ATTEMPTS,
    timeout_seconds: float = TIMEOUT_SECONDS,
    most_bytes: int = MOST_BYTES,
) -> Answer:
    """Get an address. Raises HttpError with the reason, at once if asking again would not help.

    Of an answer that is longer than `most_bytes` one byte more than that is read: a server that ignores ranges sends the
    whole file.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "amfm", "Accept-Encoding": "identity", **headers})
    opener = urllib.request.build_opener(_SameHostSecrets)
    for attempt in range(attempts):
        status: int | None = None
        try:
            with opener.open(request, timeout=timeout_seconds) as answer:
                return _read_answer(answer, most_bytes)
        except urllib.error.HTTPError as error:
            status, reason = error.code, f"HTTP {error.code} {error.reason}"
        except (OSError, HTTPException) as error:  # no such host, no connection, no answer in time
            reason = str(getattr(error, "reason", None) or error) or type(error).__name__
        if attempt + 1 == attempts or (status is not None and status not in TRANSIENT):
            raise HttpError(f"{without_secrets(url)}: {reason}", status)
        time.sleep(FIRST_PAUSE_SECONDS * 2**attempt)
    raise AssertionError("attempts is at least 1")


def _read_answer(answer: Any, most_bytes: int) -> Answer:
    """Read an answer of the client. Raises OSError if the connection ends before its bytes do."""
    names = {name.lower(): value for name, value in answer.headers.items()}
    content = answer.read(most_bytes + 1)
    if len(content) < min(int(names.get("content-length", 0)), most_bytes + 1):
        raise OSError("the connection was cut")
    return Answer(content, names, answer.geturl())


def without_secrets(url: str) -> str:
    """A path or an address for messages: without name and password, and what signed links carry behind the question mark."""
    scheme, mark, rest = url.partition("://")
    if not mark:
        return url
    host, slash, path = re.split("[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


class HttpFile:
    """One file of a web server. num_bytes: as the server said when it was looked up; version: its ETag or time."""

    def __init__(self, url: str, num_bytes: int, version: str = "", headers: Mapping[str, str] = {}) -> None:
        self.url, self.num_bytes, self.version, self.headers = url, num_bytes, version, dict(headers)
        self._address = url

    @staticmethod
    def stat(url: str, headers: Mapping[str, str] = {}, *, attempts: int = 2) -> HttpFile:
        """Ask for size and version by reading one byte, which every server of ranges answers.

        Raises HttpError if there is no answer, and ValueError if the server knows no ranges.
        """
        answer = ask(url, {**headers, "Range": "bytes=0-0"}, attempts=attempts, most_bytes=1)
        found = CONTENT_RANGE.fullmatch(answer.headers.get("content-range", ""))
        if found is None:
            raise ValueError("it is served without byte ranges; download it and name the local file")
        return HttpFile(url, int(found[3]), answer.headers.get("etag") or answer.headers.get("last-modified", ""))

    def read_range(self, start: int, stop: int) -> bytes:
        """Read bytes [start, stop). Raises HttpError, also if the file has another size by now."""
        wanted, most_bytes = {"Range": f"bytes={start}-{stop - 1}"}, stop - start
        try:
            if self._address == self.url:
                answer = ask(self.url, {**self.headers, **wanted}, most_bytes=most_bytes)
            else:
                answer = ask(self._address, wanted, attempts=1, most_bytes=most_bytes)
        except HttpError as error:
            if self._address == self.url:
                text = f"{error}; look at the network, and run the same command to continue"
                raise HttpError(text, error.status) from error
            self._address = self.url  # a signed address that has run out: ask for another one
            return self.read_range(start, stop)
        self._address = answer.url
        given = (start, stop - 1, self.num_bytes)
        found = CONTENT_RANGE.fullmatch(answer.headers.get("content-range", ""))
        if found is None or tuple(map(int, found.groups())) != given or len(answer.content) != stop - start:
            raise HttpError(
                f"{without_secrets(self.url)} does not hold bytes {start} to {stop} of {self.num_bytes} any more; it changed "
                "since it was planned: run the same command again"
            )
        return answer.content

    def open(self) -> io.BufferedReader:
        """Open the file for reading at random."""
        return io.BufferedReader(RangeStream(self.num_bytes, self.read_range), STREAM_BYTES)
