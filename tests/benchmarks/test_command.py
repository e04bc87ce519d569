"""Programs of benchmarks say where and when they ran, and every page of a benchmark does."""

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks.command import describe_run

ROOT = Path(__file__).parents[2]
PAGES = sorted(page for page in (ROOT / "docs/benchmarks").glob("*.md") if page.name != "README.md")
# What the tests of a case show, row by row: nothing is measured.
OF_TESTS = {"operator.md", "researcher.md"}


def test_a_run_is_named_by_commit_date_host_and_pytorch(tmp_path: Path) -> None:
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        identity = ["-c", "user.name=x", "-c", "user.email=x@localhost"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *command], check=True)
    assert re.fullmatch(
        r"commit [0-9a-f]{8}, 20\d\d-\d\d-\d\d, \d+ threads of .+, PyTorch \d+\.\d+.*", describe_run(tmp_path)
    )
    assert describe_run(tmp_path / "none").startswith("commit unknown, ")


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in OF_TESTS], ids=lambda page: page.stem)
def test_a_page_has_a_commit_and_a_date(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.search(r"\b(?=[0-9a-f]*\d)[0-9a-f]{8}\b", text) and re.search(r"20\d\d-\d\d-\d\d", text)
