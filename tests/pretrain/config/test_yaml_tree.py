"""YAML that is small on paper and endless in memory is rejected immediately."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.yaml_tree import TreeReader, _compose, read_tree

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 9)}]\n" for number in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (BOMB, "more than 100,000 values"),
        ("a: &a [*a]", "an alias names a value that holds it"),
        ("a: &a {b: {c: *a}}", "an alias names a value that holds it"),
        ("[" * 3000, "nested too deeply"),
        ("a: " + "[" * 100 + "]" * 100, "nested too deeply"),
    ],
    ids=["bomb", "list in itself", "mapping in itself", "open brackets", "depth"],
)
def test_an_endless_tree_is_refused(text: str, rule: str) -> None:
    began = time.process_time()
    with pytest.raises(ConfigError, match=rule):
        TreeReader("run.yaml").read(text)
    assert time.process_time() - began < 5


def test_an_alias_that_is_used_twice_is_two_values() -> None:
    assert TreeReader("run.yaml").read("a: &a {x: 1}\nb: *a\nc: [*a, *a]").plain() == {
        "a": {"x": 1}, "b": {"x": 1}, "c": [{"x": 1}, {"x": 1}],
    }  # fmt: skip


@pytest.mark.parametrize("text", ["a: !!str 240", "a: !!binary aGVsbG8=", "a: !mine {b: 1}", "!!map {a: 1}", "a: ! x"])
def test_a_tag_is_refused_and_not_left_out(text: str) -> None:
    with pytest.raises(ConfigError, match=r"run.yaml:1: not valid YAML \(a tag '.*', which is not read\); remove it"):
        TreeReader("run.yaml").read(text)


def test_a_file_of_megabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("- 1\n" * 300_000)
    with pytest.raises(ValueError, match=r"a.yaml has 1200000 bytes, more than the 1048576 that such a file may have"):
        read_tree(tmp_path / "a.yaml", [])


@pytest.mark.parametrize("digits", ["9" * 5000, "9" * 5000 + "e9", "0." + "3" * 5000])
def test_a_number_of_thousands_of_digits_is_no_number(digits: str) -> None:
    """Python refuses to read one, in words about itself; as text it is rejected with the place and rule of its setting."""
    assert TreeReader("run.yaml").read(f"a: {digits}").plain() == {"a": digits}


def test_an_extended_name_with_nul_is_refused_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text('extends: "a\\0b"\n')
    with pytest.raises(ConfigError, match=r"a.yaml:1: extends = .*must be the path of one YAML file"):
        read_tree(tmp_path / "a.yaml", [])


def test_a_text_is_parsed_once_whoever_reads_it():
    text = "a: {b: 1}  # only of this test"
    before = _compose.cache_info()
    one, other = (TreeReader(source).read(text) for source in ("one.yaml", "other.yaml"))
    after = _compose.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (1, 1)
    assert one.plain() == other.plain() and one.value is not other.value
    assert [tree.value["a"].origin.source for tree in (one, other)] == ["one.yaml", "other.yaml"]
