"""YAML that is small on paper and endless in memory is refused at once."""

from __future__ import annotations

import time

import pytest

from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.yaml_tree import TreeReader

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
