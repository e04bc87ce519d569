"""Own names only, and never through a link."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from amfm.data_pipeline.durable.files import delete, try_to_delete

OWN = re.compile(r"step-\d+\.tmp")


def test_folders_files_and_links_of_our_names_go_and_what_links_point_to_stays(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "thesis").write_text("years of work")
    for number in (1, 2, 3):
        folder = tmp_path / f"step-{number}.tmp"
        if number == 1:
            folder.symlink_to(kept)
        elif number == 2:
            folder.mkdir()
            (folder / "link").symlink_to(kept)
        else:
            folder.write_text("a file")
        delete(folder, OWN)
    delete(tmp_path / "step-9.tmp", OWN)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (kept / "thesis").read_text() == "years of work"


def test_another_name_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="is not a name of ours"):
        delete(tmp_path / "step-1", OWN)


def test_what_cannot_be_deleted_is_a_remark(tmp_path: Path) -> None:
    path = tmp_path / "file" / "step-1.tmp"
    (tmp_path / "file").write_text("not a folder")
    assert try_to_delete(path, OWN) == [
        f"{path} cannot be deleted (Not a directory); it does no harm, delete it by hand"
    ]
