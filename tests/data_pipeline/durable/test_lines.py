"""Files of JSON lines survive cuts at any byte and lines of any kind."""

from __future__ import annotations

from pathlib import Path

from amfm.data_pipeline.durable.lines import LineFile, read_lines

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
