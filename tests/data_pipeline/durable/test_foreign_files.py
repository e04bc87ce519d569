"""What others wrote leads nowhere else, is looked at before it is read, and gives one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from amfm.data_pipeline.durable.foreign_files import inside, read_object, take, understood


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
