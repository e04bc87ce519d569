"""The commands and programs of the pages run, in the order of the pages, in a clone of the repository.

A fenced `sh` or `python` block of `PAGES` runs as it is, unless a comment in the page's source stands before it:
`<!-- not run: REASON -->` with one of `REASONS`, `<!-- run: OLD => NEW; OLD => NEW -->` where a name or size is the reader's
choice, or `<!-- run in the background -->` for a server that later blocks ask. A `text` block after one is its output: its
lines are printed in this order, with others between them. Words are equal, numbers within `TOLERANCE`, and `...` stands for
what differs from run to run: times, paths, the rest of a line.
"""

import difflib
import math
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    *(f"docs/{name}.md" for name in ("getting_started", "python", "export", "evaluation", "tracking", "debugging")),
    *(f"docs/{name}.md" for name in ("data", "batch_sizes", "mixers", "finetuning")),
    "recipes/README.md",
)
REASONS = ("GPU", "network", "cluster", "another program", "the suite itself")
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>.*?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$"
    r"(?:\n\n```text\n(?P<stated>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
ADDRESS = "http://127.0.0.1:8000/"
PATIENCE_SECONDS = 900
TOLERANCE = 0.05
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?")
# Pages whose readers compare what they see with what they should see.
STATED = ("README.md", *(f"docs/{name}.md" for name in ("getting_started", "python", "evaluation", "data", "export")))


class Block(NamedTuple):
    """A fenced block: the page and line where it begins, its language and code, the comment before it, and the output after it."""

    place: str
    language: str
    code: str
    mark: str
    stated: str

    @property
    def runs(self) -> bool:
        return not self.mark.startswith("not run:")

    def as_run(self) -> str:
        """The code with the replacements of its mark."""
        code = self.code
        for pair in self.mark.removeprefix("run:").split(";") if self.mark.startswith("run:") else ():
            old, new = (side.strip() for side in pair.split("=>"))
            assert old in code, f"{self.place}: {old!r} is not in the block"
            code = code.replace(old, new)
        return code


def read_blocks(*pages: str) -> list[Block]:
    found = []
    for page in pages or PAGES:
        text = (ROOT / page).read_text()
        for match in FENCE.finditer(text):
            if match["language"] in ("sh", "python"):
                line = text[: match.start("language")].count("\n") + 1
                found.append(
                    Block(
                        f"{page}:{line}", match["language"], match["code"], match["mark"] or "", match["stated"] or ""
                    )
                )
    return found


def test_a_block_runs_or_names_a_known_reason() -> None:
    marks = Counter(block.mark.split("(")[0].strip() for block in read_blocks())
    unknown = [mark for mark in marks if mark and mark not in {f"not run: {reason}" for reason in REASONS}]
    assert [mark for mark in unknown if not mark.startswith("run")] == []
    for block in read_blocks():
        block.as_run()
    assert sum(block.runs for block in read_blocks()) >= 12


def test_no_commands_are_in_a_block_without_a_language() -> None:
    bare = [
        f"{page}: {match['code'].splitlines()[0]}"
        for page in PAGES
        for match in FENCE.finditer((ROOT / page).read_text())
        if match["language"] == "" and re.match(r"amfm |python |pip |make |PYTHON", match["code"])
    ]
    assert not bare, f"write ```sh, so that they run or state why they do not: {bare}"


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A clone in which the quickstart has run: one of an earlier call if `PAGES_CLONE` names its folder."""
    folder = Path(os.environ.get("PAGES_CLONE") or tmp_path_factory.mktemp("pages") / "amfm")
    if not folder.exists():
        subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
        (folder / ".venv").symlink_to(Path(sys.prefix))
        os.utime(folder / "pyproject.toml", (0, 0))  # older than .venv/.installed: `make` installs nothing again
    if not (folder / "exports" / "tiny_cpu").exists():
        subprocess.run(["make", "quickstart"], cwd=folder, env=variables_of(folder), check=True, timeout=3600)
    return folder


def variables_of(clone: Path) -> dict[str, str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return variables | {"PATH": f"{clone / '.venv' / 'bin'}:{variables['PATH']}"}


@pytest.mark.slow
@pytest.mark.timeout(14_400)
@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_that_can_run_here_does(clone: Path, page: str) -> None:
    failing, servers = [], []
    try:
        for block in read_blocks(page):
            if not block.runs:
                continue
            program = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
            command, variables = [*program, block.as_run()], variables_of(clone)
            if block.mark == "run in the background":
                servers.append(subprocess.Popen(command, cwd=clone, env=variables))
                wait_for_server(servers[-1])
                continue
            done = subprocess.run(
                command, check=False, cwd=clone, env=variables, capture_output=True, text=True, timeout=3600
            )
            if done.returncode:
                said = f"{done.stdout[-500:]}\n{done.stderr[-1500:]}"
                failing.append(f"{block.place}: exit code {done.returncode}\n{said}")
            failing += [f"{block.place}: {line}" for line in differing_lines(block.stated, done.stdout + done.stderr)]
    finally:
        for server in servers:
            server.terminate()
            server.wait(PATIENCE_SECONDS)
    assert not failing, "\n\n".join(failing)


def differing_lines(stated: str, printed: str) -> list[str]:
    """The lines of a page's `text` block that are not printed after the one before, with the printed one that is nearest."""
    rest, missing = printed.splitlines(), []
    for line in filter(str.strip, stated.splitlines()):
        place = next((place for place, other in enumerate(rest) if is_alike(line, other)), None)
        if place is None:
            nearest = "".join(difflib.get_close_matches(line, rest, n=1, cutoff=0.0))
            missing.append(f"no line like {line!r} was printed; nearest: {nearest!r}")
        else:
            rest = rest[place + 1 :]
    return missing


def is_alike(stated: str, printed: str) -> bool:
    line, other = as_words(stated), as_words(printed)
    pattern = re.escape(NUMBER.sub("\0", line)).replace("\0", f"({NUMBER.pattern})").replace(r"\.\.\.", ".*")
    found = re.fullmatch(pattern, other)
    return found is not None and all(
        math.isclose(float(one), float(other), rel_tol=TOLERANCE)
        for one, other in zip(NUMBER.findall(line), found.groups(), strict=True)
    )


def as_words(line: str) -> str:
    """A line without the borders of tables, commas of thousands and repeated spaces."""
    return " ".join(re.sub(r"(?<=\d),(?=\d{3})", "", re.sub("[│┃]", " ", line)).split())


PRINTED = """
│ loss    │  3.41  │
wrote /tmp/a (1,234 bytes) in 3.5 s
MFU 2.5%, 1.1 GiB
"""


@pytest.mark.parametrize(
    "stated",
    [
        "loss 3.46",
        "wrote ... (1,250 bytes) in ...",
        "loss 3.41\nMFU 2.5%, 1.1 GiB",
        "MFU 2.45%, 1.12 GiB",
        "... (1,234 bytes) in 3.6 s",
    ],
)
def test_a_stated_line_is_found_with_numbers_within_the_tolerance(stated: str) -> None:
    assert not differing_lines(stated, PRINTED)


@pytest.mark.parametrize(
    "stated",
    [
        "loss 4.41",
        "step 3.41",
        "loss",
        "wrote ... (1,434 bytes) in ...",
        "MFU 2.5%, 1.3 GiB",
        "MFU 2.5, 1.1 GiB",
        "MFU 2.5%, 1.1 GiB\nloss 3.41",
    ],
)
def test_a_wrong_number_word_unit_or_order_is_reported_with_the_nearest_line(stated: str) -> None:
    (found,) = differing_lines(stated, PRINTED)
    assert repr(stated.splitlines()[-1]) in found and "nearest: '" in found


def test_pages_that_readers_compare_state_an_output_and_only_of_blocks_that_run() -> None:
    stated = [block for block in read_blocks() if block.stated]
    assert {block.place.split(":")[0] for block in stated} >= set(STATED)
    assert [block.place for block in stated if not block.runs or block.mark == "run in the background"] == []


def wait_for_server(server: subprocess.Popen) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(ADDRESS, timeout=PATIENCE_SECONDS).close()
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"the server ended with {server.poll()} or did not answer")
