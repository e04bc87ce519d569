"""Reads the table of published bugs, and writes docs/published_bugs.md of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "published_bugs.md"
TABLE = Path(__file__).with_name("catalogue.yaml")


@dataclass(frozen=True)
class Change:
    """Text of a file of ours, which stands there once, and what it becomes."""

    file: str
    old: str
    new: str

    def apply(self, text: str) -> str:
        """The file's text with the change. Fails where the text is not there, or several times."""
        found = text.count(self.old)
        assert found == 1, (
            f"{self.file} has {found} times what is to be changed, {self.old!r}: plant it in today's code"
        )
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Bug:
    """A silent bug that was published, what amfm does, and the test that shows it.

    plant: changes of our code that bring the bug in; empty if it was not tried.
    """

    key: str
    topic: str
    links: tuple[str, ...]
    wrong: str
    here: str
    test: str
    plant: tuple[Change, ...] = ()


@dataclass(frozen=True)
class GpuBug:
    """One that only a GPU can show, and why."""

    links: tuple[str, ...]
    wrong: str
    reason: str


@cache
def read_table() -> tuple[tuple[Bug, ...], tuple[GpuBug, ...]]:
    """The bugs that tests show, and those that need a GPU."""
    tree = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    bugs = [
        Bug(**row | {"links": tuple(row["links"]), "plant": tuple(Change(**each) for each in row.get("plant", ()))})
        for row in tree["bugs"]
    ]
    return tuple(bugs), tuple(GpuBug(**row | {"links": tuple(row["links"])}) for row in tree["needs_gpu"])


def write_page() -> str:
    """The page of the table."""
    bugs, on_gpu = read_table()
    planted = sum(bool(bug.plant) for bug in bugs)
    lines = [
        "# Published bugs",
        "",
        "<!-- Written by `make docs` (`python -m tests.published`) from tests/published/catalogue.yaml; change that. -->",
        "",
        f"Programs that train language models had {len(bugs)} silent bugs, published by their users and authors, which also "
        "concern what amfm does: a run continued with a wrong gradient, norm, order of data or report. Each row names a test "
        "of amfm that compares with one rank, a float64 reference or a rule, and passes. "
        f"For {planted} rows the bug was planted in the code of amfm, and the test failed (`python -m tests.published plant KEY`, "
        f"or all of them: `pytest -m slow tests/published`). {len(on_gpu)} more need a GPU.",
    ]
    for topic in dict.fromkeys(bug.topic for bug in bugs):
        lines += [
            "",
            f"## {topic}",
            "",
            "| what went wrong | where | amfm | test | seen when planted |",
            "|---|---|---|---|---|",
        ]
        lines += ["| " + " | ".join(cells(bug)) + " |" for bug in bugs if bug.topic == topic]
    lines += ["", "## Not shown without a GPU", "", "| what went wrong | where | why |", "|---|---|---|"]
    lines += [f"| {bug.wrong} | {', '.join(map(link, bug.links))} | {bug.reason} |" for bug in on_gpu]
    return "\n".join(lines) + "\n"


def cells(bug: Bug) -> Iterator[str]:
    """The cells of a row."""
    path, _, name = bug.test.partition("::")
    yield bug.wrong
    yield ", ".join(map(link, bug.links))
    yield bug.here
    yield f"[`{name}`](../{path})"
    yield "yes" if bug.plant else "not planted"


def link(place: str) -> str:
    """A link to an issue or pull request, with project and number as its text."""
    _, project, _, number = place.split("/")
    return f"[{project}#{number}](https://github.com/{place})"
