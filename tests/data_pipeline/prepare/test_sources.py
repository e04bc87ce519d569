"""Which files of a folder are a source's, and that none is left out silently."""

import os

import pytest

from amfm.data_pipeline.config import SourceConfig
from amfm.data_pipeline.prepare import sources
from amfm.data_pipeline.store import http_files


def files_of(path) -> list[str]:
    return [file.name for file in sources.list_files(SourceConfig(name="a", paths=(str(path),)))]


@pytest.fixture
def folder(tmp_path):
    for name in ("a.txt", "sub/b.jsonl", ".hidden/c.txt", "lost+found/d.txt", "notes.pdf"):
        (tmp_path / "text" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "text" / name).write_text("text")
    return tmp_path / "text"


def test_files_below_a_folder_and_links_to_files_are_the_source(folder):
    (folder / "link.txt").symlink_to(folder / "notes.pdf")
    assert files_of(folder) == ["0/a.txt", "0/link.txt", "0/sub/b.jsonl"]


@pytest.mark.parametrize("given", ["", "*.txt"], ids=["folder", "glob"])
def test_a_link_to_nothing_is_named(folder, given):
    (folder / "other").symlink_to("nothing")  # has no name of text
    assert "0/a.txt" in files_of(folder / given)
    (folder / "link.txt").symlink_to("nothing")
    with pytest.raises(ValueError, match=r"link\.txt is a link to nothing, which is not there; fix or remove it"):
        files_of(folder / given)


def test_a_link_to_a_folder_is_named_with_what_it_leads_to(folder, tmp_path):
    (folder / "more").symlink_to(tmp_path)
    with pytest.raises(
        ValueError, match=rf"more is a link to a folder, .*; add {tmp_path} to paths, or remove the link"
    ):
        files_of(folder)


@pytest.mark.parametrize("given", ["**/*.txt", "*/*.txt", "s*/**/*.jsonl", "**"])
def test_a_glob_refuses_links_to_folders_which_may_lead_back(folder, given):
    expected = {"*/*.txt": None, "s*/**/*.jsonl": ["0/sub/b.jsonl"]}.get(
        given, ["0/a.txt", "0/sub/b.jsonl"][: 1 + (given == "**")]
    )
    if expected:
        assert files_of(folder / given) == expected
    place = folder / "sub" if given.startswith("s") else folder
    (place / "self").symlink_to(".")
    (place / "me").symlink_to(".")  # two: 2^40 paths, by glob.glob
    with pytest.raises(ValueError, match=r"(self|me) is a link to a folder, and those are not followed; add "):
        files_of(folder / given)


def test_a_glob_may_begin_at_a_link_and_match_links_to_files(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    (folder / "sub" / "c.txt").symlink_to(folder / "a.txt")
    assert files_of(tmp_path / "link" / "**" / "*.txt") == ["0/a.txt", "0/sub/c.txt"]
    assert files_of(tmp_path / "link" / "s*" / "*.txt") == ["0/sub/c.txt"]


@pytest.mark.parametrize("given", ["", " "])
def test_an_empty_path_is_not_the_working_directory(folder, monkeypatch, given):
    monkeypatch.chdir(folder)
    assert files_of(".") == ["0/a.txt", "0/sub/b.jsonl"]
    with pytest.raises(ValueError, match="is empty, and would be all of the working directory"):
        files_of(given)


def test_a_folder_that_cannot_be_read_is_named(folder, monkeypatch):
    listed = sources.os.scandir

    def scandir(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(sources.os, "scandir", scandir)  # root, who may run the tests, can read every folder
    with pytest.raises(ValueError, match=r"sub cannot be read \(Permission denied\); make it readable"):
        files_of(folder)


def test_messages_leave_out_the_secrets_of_an_address(monkeypatch):
    monkeypatch.setattr(http_files, "FIRST_PAUSE_SECONDS", 0.0)
    for address in (
        "http://user:SECRET@127.0.0.1:9/x.jsonl",
        "http://127.0.0.1:9/x.jsonl?X-Amz-Signature=SECRET#SECRET",
    ):
        with pytest.raises(ValueError, match=r"path 'http://127\.0\.0\.1:9/x\.jsonl' ") as refused:
            files_of(address)
        assert "SECRET" not in str(refused.value)
    shown = sources.InputFile("s3://key:SECRET@bucket/a?SECRET", "0/a", "text", "none", 1, 1).shown
    assert shown == "s3://bucket/a"
    assert http_files.without_secrets("/data/what?/@home") == "/data/what?/@home"


def test_a_pipe_is_refused_by_name_in_a_folder_and_by_a_glob(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "b.txt")
    for path in (tmp_path / "b.txt", tmp_path, tmp_path / "*.txt"):
        with pytest.raises(ValueError, match=r"b.txt is not a regular file"):
            files_of(path)
