"""Checkpoints that come from elsewhere, a store or the memory of nodes: copies checked against their digests, and the
rename at the end.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from amfm.data_pipeline.durable.files import named, sync, try_to_delete
from amfm.pretrain.checkpoint.commit import LATEST_NAME, TEMPORARY_NAME, RankFailure
from amfm.pretrain.checkpoint.files import replace_text, sync_folders
from amfm.pretrain.ranks.group import RankGroup

FETCH_BYTES = 1 << 24


class Source(Protocol):
    """What can be read in blocks; the end is an empty one."""

    def read(self, size: int, /) -> bytes:
        """Read at most this many bytes."""
        ...


def copy_verified(source: Source, path: Path, name: str, entry: Mapping[str, Any]) -> str | None:
    """Copy a file durably, hashing it on the way; returns what is damaged, and then leaves no copy, or None."""
    digest, size = hashlib.sha256(), 0
    with named(path), path.open("xb") as file:
        while block := source.read(FETCH_BYTES):
            digest.update(block)
            file.write(block)
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    if (size, digest.hexdigest()) == (entry["bytes"], entry["sha256"]):
        return None
    path.unlink()
    return f"{name}: {size} bytes with SHA-256 {digest.hexdigest()}, the manifest says {entry['bytes']} and {entry['sha256']}"


def commit_fetched(
    temporary_dir: Path, name: str, damages: list[str], problem: RankFailure, ranks: RankGroup, doing: str
) -> str | None:
    """Rename what all ranks have copied to the checkpoint `name`, or remove it where something is damaged or failed.

    All ranks must call it. Returns the damages of all ranks, None for none; raises RuntimeError on all where one failed.
    """
    told = ranks.all_gather((problem.text, damages))
    failed = any(text is not None for text, _ in told)
    damages = [text for _, texts in told for text in texts]
    if ranks.rank == 0:
        if failed or damages:
            try_to_delete(temporary_dir, TEMPORARY_NAME)
        else:
            with problem.caught():
                sync_folders(temporary_dir)
                os.rename(temporary_dir, temporary_dir.with_name(name))
                sync(temporary_dir.parent)
                replace_text(temporary_dir.with_name(LATEST_NAME), name + "\n")
    ranks.raise_together(problem.text, doing)
    return "; ".join(damages) or None
