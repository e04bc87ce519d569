"""The table of published bugs names tests that exist, the page is that of the table, and planted bugs are seen."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import pytest

from tests.helpers.processes.zygote import run_program
from tests.mutation.workshop import Workshop
from tests.published.catalogue import PAGE, ROOT, Bug, read_table, write_page
from tests.published.plant import see

BUGS, ON_GPU = read_table()


def test_the_page_is_that_of_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == write_page(), "run: make docs"


def test_at_least_forty_bugs_have_a_row_each_with_its_source() -> None:
    assert len(BUGS) >= 40 and len(BUGS) == len({bug.key for bug in BUGS})
    for bug in (*BUGS, *ON_GPU):
        assert bug.links and all(re.fullmatch(r"[\w.-]+/[\w.-]+/(issues|pull)/\d+", link) for link in bug.links), bug


def test_every_test_of_the_table_exists(request: pytest.FixtureRequest) -> None:
    """In files that this pytest has collected the very test, with its parameters; in others the function."""
    names = [item.nodeid for item in request.session.items]
    collected = {*names, *(name.partition("[")[0] for name in names)}
    files = set() if only_some(request) else {name.partition("::")[0] for name in names}
    for bug in BUGS:
        path, _, name = bug.test.partition("::")
        text = (ROOT / path).read_text(encoding="utf-8")
        assert f"\ndef {name.partition('[')[0]}(" in text, f"{bug.key}: {path} has no {name}"
        if path in files and "pytest.mark.slow" not in text:
            assert bug.test in collected, f"{bug.key}: {bug.test}"


def only_some(request: pytest.FixtureRequest) -> bool:
    """Whether pytest was asked for some of the tests of a file."""
    return bool(request.config.option.keyword) or any("::" in word for word in request.config.args)


@pytest.mark.slow
def test_every_test_of_the_table_is_collected() -> None:
    words = ["-m", "", "--collect-only", "-p", "no:cacheprovider", "-n0", *sorted({bug.test for bug in BUGS})]
    collected = run_program([sys.executable, "-m", "pytest", *words], cwd=ROOT)
    assert collected.returncode == 0, collected.stdout + collected.stderr


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    shop = Workshop(tmp_path_factory.mktemp("workshop"))
    yield shop
    shop.close()


@pytest.mark.slow
@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug.plant], ids=lambda bug: bug.key)
def test_a_planted_bug_is_seen(workshop: Workshop, bug: Bug) -> None:
    is_seen, how = see(workshop, bug)
    assert is_seen, how
