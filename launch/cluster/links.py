"""Links of nodes to the first one, and ports: where ranks meet, which no other job on the same host may have."""

from __future__ import annotations

import errno
import random
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

LINK_SECONDS = 8.0
TRY_SECONDS = 5.0
LOWEST_PORT = 20_000  # below are those of Ray's workers
NUM_CANDIDATES = 8
UNREACHED = "it does not reach"
NO_IPV6 = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def listen(port: int = 0, backlog: int = 128) -> socket.socket:
    """A listener at all addresses of this host, IPv4 and IPv6 where it has both. Raises OSError for a port that is taken."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
        except OSError as error:
            if error.errno not in NO_IPV6:
                raise
    return socket.create_server(("", port), backlog=backlog)


def port_range() -> range:
    """Ports that the kernel does not give to connections on its own: one of those would be taken again before long."""
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:  # not Linux
        first = 49_152
    return range(LOWEST_PORT, max(first, LOWEST_PORT + 1000))


def find_port() -> int:
    """A port that is free, for a process that listens there many seconds later."""
    ports = port_range()
    for port in random.sample(ports, 100):
        with suppress(OSError), listen(port):
            return port
    raise RuntimeError(
        f"no port between {ports.start} and {ports.stop} is free for the ranks to meet; free some on this host"
    )


def candidates(name: str) -> list[int]:
    """Ports for a listener that cannot say which one it has: the first of these that is free. Other names have others."""
    return random.Random(name).sample(range(LOWEST_PORT, LOWEST_PORT + 12_000), NUM_CANDIDATES)


def await_links(listener: socket.socket, expect: int, token: str, patience: float) -> None:
    """Give the token to this many who come, for as long as they try."""
    come, deadline = 0, time.monotonic() + patience + LINK_SECONDS
    while come < expect and (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        with suppress(OSError):
            other, _ = listener.accept()
            with other:
                other.sendall(token.encode())
                come += 1


def check_link(link: Mapping[str, Any], token: str, patience: float) -> Iterator[str]:
    """Go to the first node, which listens at one of these ports, and hear its token; other programs may have the other ports.

    patience: seconds for which to try, whether or not the first one listens yet.
    """
    host, ports = link["connect"]
    deadline, reason = time.monotonic() + patience, "no answer"
    while (left := deadline - time.monotonic()) > 0:
        for port in ports:
            try:
                with socket.create_connection((host, port), timeout=max(0.1, min(TRY_SECONDS, left))) as connection:
                    if connection.recv(len(token), socket.MSG_WAITALL) == token.encode():
                        return
            except OSError as error:
                reason = str(error)
        time.sleep(0.2)
    where = f"port {ports[0]}" if len(ports) == 1 else f"ports {', '.join(map(str, ports))}"
    yield f"{UNREACHED} {host} ({where}): {reason}; look at its link, its interface and firewalls"


def blame_links(faults: Mapping[str, Sequence[str]], first: str) -> dict[str, list[str]]:
    """Faults by node, where a first node that none of several others reaches is the one at fault, and not all others."""
    found = {name: list(texts) for name, texts in faults.items()}
    unreached = [name for name, texts in found.items() if any(UNREACHED in text for text in texts)]
    if len(unreached) > 1 and len(unreached) == len(found) - 1 and first in found:
        found[first].append(f"none of {len(unreached)} others reaches it")
        for name in unreached:
            found[name] = [text for text in found[name] if UNREACHED not in text]
    return found
