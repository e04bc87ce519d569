"""Deleting, in one place: what carries a name of our own and nothing else, and never through a link.

A link with such a name is removed itself; what it points to is not ours. Where something complete stands already (a
checkpoint after its commit, a store after its manifest), a leftover that can't be deleted is a remark: `try_to_delete`.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path


def delete(path: Path, own_name: re.Pattern[str]) -> None:
    """Delete a file or a folder with everything in it. Raises OSError; nothing happens when it is absent."""
    assert own_name.fullmatch(path.name), f"{path} is not a name of ours ({own_name.pattern})"
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def try_to_delete(path: Path, own_name: re.Pattern[str]) -> list[str]:
    """The same where a failure does no harm: a remark about what stays, or nothing."""
    try:
        delete(path, own_name)
    except OSError as error:
        return [f"{path} can't be deleted ({error.strerror or error}); it does no harm, delete it by hand"]
    return []
