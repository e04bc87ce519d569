"""What others wrote leads nowhere else, is looked at before it is read, and gives one message; JSON lines survive cuts at any byte."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from amfm.data_pipeline.durable.json_files import (
    LineFile,
    inside,
    read_bounded,
    read_lines,
    read_object,
    read_word,
    take,
    understood,
)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", ".", "a\0b", None, 3, ["x"]])
def test_a_name_that_is_no_file_below_the_folder_is_refused(name: object) -> None:
    with pytest.raises(RuntimeError, match="which is not one below it"):
        inside(Path("model"), name, RuntimeError)


def test_a_name_below_the_folder_is_its_path() -> None:
    assert inside(Path("model"), "part/a.safetensors") == Path("model/part/a.safetensors")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"null", "must hold a JSON object, not NoneType"),
        (b"[]", "must hold a JSON object, not list"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"{" + b" " * 100 + b"}", "more than the 64 that such a file may have"),
    ],
)
def test_what_is_no_small_object_gives_one_message(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_object(path, max_bytes=64 if len(content) < 1000 else 1 << 20)
    assert str(caught.value).startswith(str(path))


def test_a_key_that_is_missing_or_of_another_kind_is_named() -> None:
    with pytest.raises(ValueError, match="index: weight_map is missing, it must be dict"):
        take({}, "weight_map", dict, "index")
    with pytest.raises(ValueError, match="index: bytes is True, it must be int"):
        take({"bytes": True}, "bytes", int, "index")
    with pytest.raises(ValueError, match="m is not as its format asks: 'layout' is missing"), understood("m"):
        {}["layout"]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (read_object, read_word, lambda path: list(read_lines(path))):
        with pytest.raises(OSError, match="is not a regular file"):
            read(tmp_path / "pipe")


def test_a_file_of_one_word_is_one_word(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    path.write_text("global_step4\n")
    assert read_word(path) == "global_step4"
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="must hold one word"):
        read_word(path)
    path.write_bytes(b"a" * 5000)
    with pytest.raises(ValueError, match="latest has 5000 bytes, more than the 4096"):
        read_word(path)


def test_what_the_storage_refuses_while_it_is_read_has_its_path() -> None:
    with pytest.raises(OSError, match="/proc/self/mem"):  # whose first page is never there
        read_bounded(Path("/proc/self/mem"))


RECORDS = [{"step": 1, "loss": 2.5}, {"step": 2, "text": "é\n"}, {"step": 3}]


def test_cut_at_every_byte_whole_lines_stay_and_the_next_one_is_apart(tmp_path: Path) -> None:
    path = tmp_path / "whole"
    file = LineFile(path)
    for record in RECORDS:
        file.write(record)
    file.close()
    content = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    for size in range(len(content) + 1):
        cut = tmp_path / "cut"
        cut.write_bytes(content[:size])
        file = LineFile(cut)
        file.write({"step": 9})
        file.sync()
        file.close()
        # A line that lacks only its newline is whole.
        kept = sum(end <= size + 1 for end in ends) if size else 0
        assert [record for _, record in read_lines(cut)] == [*RECORDS[:kept], {"step": 9}], size


def test_what_is_no_object_is_none_and_keeps_its_number(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_bytes(b'null\n[]\n\n{"step": 1}\n' + b"[" * 100_000 + b"\n\xff\xfe\n")
    assert list(read_lines(path)) == [(1, None), (2, None), (4, {"step": 1}), (5, None), (6, None)]


def test_a_file_that_was_renamed_or_removed_is_begun_at_its_path_at_the_next_sync(tmp_path: Path) -> None:
    path, rotated = tmp_path / "log", tmp_path / "log.1"
    file = LineFile(path)
    for number, take_away in enumerate((lambda: path.rename(rotated), path.unlink)):
        file.write({"step": 2 * number})
        take_away()
        file.write({"step": 2 * number + 1})
        file.sync()
    file.write({"step": 4})
    file.close()
    assert [record for _, record in read_lines(rotated)] == [{"step": 0}, {"step": 1}]
    assert [record for _, record in read_lines(path)] == [{"step": 4}]
