"""A lock file is held by one, and is not a way to another file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from amfm.data_pipeline.durable.files import take_lock
from amfm.data_pipeline.durable.json_files import LineFile


def test_a_lock_has_one_holder_and_keeps_what_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("a warning")
    first = take_lock(path, wait=False)
    assert first is not None and take_lock(path, wait=False) is None
    first.close()
    second = take_lock(path, wait=True)
    assert second is not None and path.read_text() == "a warning"
    second.close()


def test_a_link_in_the_place_of_a_lock_is_refused_and_its_target_untouched(tmp_path: Path) -> None:
    victim, path = tmp_path / "thesis.tex", tmp_path / "lock"
    victim.write_text("years of work")
    path.symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        take_lock(path, wait=False)
    assert victim.read_text() == "years of work"


def test_locks_and_logs_have_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    """A group with umask 002 continues the run of a colleague."""
    before = os.umask(0o002)
    try:
        lock, lines = take_lock(tmp_path / "lock", wait=False), LineFile(tmp_path / "lines")
    finally:
        os.umask(before)
    assert lock is not None
    lock.close()
    lines.close()
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o664}
