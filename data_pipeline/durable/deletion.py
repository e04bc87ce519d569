"""Deletion in one place: only of files and folders with a name that this program gives, and never through a link.

Stores and checkpoints lie in folders that a user names, next to files of the user. So the caller passes the pattern of the
names that it writes, and a path that doesn't match is our bug and not deleted. A link with such a name is removed itself;
what it points to is not ours. Where something complete stands already (a checkpoint after its commit, a store after its
manifest), a leftover that can't be deleted is a remark and no failure: `try_to_delete`.
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
    """Delete as `delete` does where a failure does no harm; returns a remark about what stays, or an empty list."""
    try:
        delete(path, own_name)
    except OSError as error:
        return [f"{path} can't be deleted ({error.strerror or error}); it does no harm, delete it by hand"]
    return []
