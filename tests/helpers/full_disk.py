"""A limit on the size of files stands for a full disk: the same error path, and no root is needed."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager


def limit_files(num_bytes: int) -> None:
    """From now on writing beyond this size of a file fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextmanager
def largest_file(num_bytes: int | None = None) -> Iterator[None]:
    """Inside the block writing beyond this size fails (None: beyond what `limit_files` says there); after it as before."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if num_bytes is not None:
        limit_files(num_bytes)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
