"""The word list of CONTRIBUTING.md finds what it should in pages and in Python, and nothing in code or link targets."""

from collections import Counter
from pathlib import Path

import pytest

from tests.prose import LONGEST, MOST_NAMES, check, check_names, check_source, read_rules, words_of_names

RULES = read_rules((Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "text",
    [
        "It sends 12 bytes a parameter.",
        "| rate | tokens a second |",
        "Our step beside theirs.",
        "A path that is no file is rejected.",
        "Run it on your Card.",
        "The run goes\non from there.",
        "word " * (LONGEST // 5 + 1),
    ],
)
def test_a_habit_is_found_once(text: str) -> None:
    assert len(check("page.md", text, RULES)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "There is no GPU; it is no longer needed, and it takes a minute per model card.",
        "`amfm bench card` and [a page](docs/beside.md#card)",
        "```\nbeside a card, 12 bytes a parameter\n```",
        "- one\n" * LONGEST,
    ],
)
def test_plain_english_and_code_pass(text: str) -> None:
    assert check("page.md", text, RULES) == []


@pytest.mark.parametrize(
    "source",
    [
        '"""Seconds of a step beside the plan."""',
        "size = 1  # bytes a parameter",
        'raise ValueError(f"{path} is no file; name another")',
        "x = 1  # the run\ny = 2  # goes on from there",
    ],
)
def test_a_habit_in_comments_docstrings_and_messages_is_found_once(source: str) -> None:
    assert len(check_source("file.py", source, RULES)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "card = beside.card['card']",
        'key = "beside"',
        'f"{card.name} has `a card` at kernels/proof/card.py <b class=card>"',
        '"""The manifest says so; values lie in [0, 1)."""',
    ],
)
def test_python_outside_of_words_passes(source: str) -> None:
    assert check_source("file.py", source, RULES) == []


def test_comments_and_echoed_words_of_yaml_and_scripts_are_read_and_their_values_are_not() -> None:
    text = "#!/bin/sh beside\nsteps: 3   # 12 bytes a parameter, `beside`\ncolour: '#beside'  # --beside, a/beside, x=beside\n"
    assert len(check_source("a.yaml", text, RULES)) == 1


def test_rules_for_what_users_see_hold_for_messages_and_echoed_words_but_not_for_docstrings() -> None:
    shown = 'raise ValueError(f"{path} says of its own")'
    assert len(check_source("model/file.py", shown, RULES)) == 2
    assert (
        check_source("tests/file.py", shown, RULES) == check_source("model/file.py", '"""It says so."""', RULES) == []
    )
    assert len(check_source("Makefile", "all:\n\t@echo 'make room beside x'\n", RULES)) == 2


def test_words_of_names_are_counted_and_may_not_become_more() -> None:
    source = "class RowRoom:\n    def land(self, card_size, *, at_hand=1): ...\n"
    assert list(words_of_names("model/hang_up.py", source)) == [
        "hang",
        "up",
        "row",
        "room",
        "land",
        "self",
        "card",
        "size",
        "at",
        "hand",
    ]
    assert check_names(Counter(MOST_NAMES)) == []
    (found,) = check_names(Counter(MOST_NAMES) + Counter(["mend"]))
    assert "'mend' in 1 places, at most 0" in found
