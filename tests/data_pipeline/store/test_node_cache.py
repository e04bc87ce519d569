"""A cache that someone else can write to is not used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from amfm.data_pipeline.store.node_cache import own_folder


def test_a_folder_of_the_cache_is_made_for_its_user_alone(tmp_path: Path) -> None:
    own_folder(tmp_path / "cache" / "blocks")
    assert (tmp_path / "cache" / "blocks").stat().st_mode & 0o777 == 0o700
    own_folder(tmp_path / "cache" / "blocks")


def test_a_folder_that_others_may_write_to_and_a_link_are_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for name in ("open", "link"):
        with pytest.raises(RuntimeError, match="that no one else can write to"):
            own_folder(tmp_path / name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", 12345, 12345)
    with pytest.raises(RuntimeError, match="must be a folder of this user"):
        own_folder(tmp_path / "theirs")
