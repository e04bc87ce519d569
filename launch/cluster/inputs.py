"""What every node must see as the launcher does, besides the run directory: the token store, and folders of `plugins`.

A node without such a mount would end the whole run as a wrong setting. It is excluded instead, unless all nodes lack it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amfm.pretrain.config.schema import RunConfig

ABSENT = "does not see the launcher's"


def list_inputs(config: RunConfig) -> dict[str, str]:
    """Paths of the files that nodes must see, with their digests; nothing for a store at a URL."""
    from amfm.data_pipeline.store.manifest import MANIFEST  # which nodes need not import for the check
    from amfm.data_pipeline.store.object_store import is_url

    files = [path for folder in config.plugins for path in Path(folder).expanduser().absolute().rglob("*.py")]
    if config.data.store is not None and config.data.synthetic is None and not is_url(config.data.store):
        files.append(Path(config.data.store, MANIFEST).absolute())
    return {str(path): digest(path) for path in files if path.is_file()}


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_inputs(inputs: Mapping[str, str]) -> Iterator[str]:
    """The files are there, and are the launcher's."""
    for path, expected in inputs.items():
        try:
            if digest(Path(path)) != expected:
                yield f"it {ABSENT} {path} but another one; mount the shared storage again"
        except OSError as error:
            yield f"it {ABSENT} {path}: {error.strerror}; mount its storage there"


def blame_inputs(faults: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError if several nodes were asked and none sees the launcher's files: the setting is at fault then."""
    texts = [text for found in faults.values() for text in found if ABSENT in text]
    if len(faults) > 1 and len(texts) >= len(faults):
        raise ValueError(f"none of {len(faults)} nodes sees the launcher's files: {texts[0]}")
