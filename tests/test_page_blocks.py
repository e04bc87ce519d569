"""The commands and programs of the pages run, in the order of the pages, in a clone of the repository.

A fenced `sh` or `python` block of `PAGES` runs as it is, unless a comment in the page's source stands before it:
`<!-- not run: REASON -->` with one of `REASONS`, `<!-- run: OLD => NEW; OLD => NEW -->` where a name or size is the reader's
choice, or `<!-- run in the background -->` for a server that later blocks ask.
"""

import os
import re
import shutil
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
FENCE = re.compile(r"(?:^<!-- (?P<mark>.*?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
ADDRESS = "http://127.0.0.1:8000/"
PATIENCE_SECONDS = 900


class Block(NamedTuple):
    """A fenced block: the page and line where it begins, its language and code, and the comment before it."""

    place: str
    language: str
    code: str
    mark: str

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


def read_blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text()
        for match in FENCE.finditer(text):
            if match["language"] in ("sh", "python"):
                line = text[: match.start("language")].count("\n") + 1
                found.append(Block(f"{page}:{line}", match["language"], match["code"], match["mark"] or ""))
    return found


def test_a_block_runs_or_names_a_known_reason() -> None:
    marks = Counter(block.mark.split("(")[0].strip() for block in read_blocks())
    unknown = [mark for mark in marks if mark and mark not in {f"not run: {reason}" for reason in REASONS}]
    assert [mark for mark in unknown if not mark.startswith("run")] == []
    for block in read_blocks():
        block.as_run()
    assert sum(block.runs for block in read_blocks()) >= 12


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages") / "amfm"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    environment = Path(sys.prefix)
    (folder / ".venv").symlink_to(environment)
    os.utime(folder / "pyproject.toml", (0, 0))  # older than .venv/.installed: `make` installs nothing again
    return folder


@pytest.mark.slow
@pytest.mark.timeout(14_400)
def test_every_block_that_can_run_here_does(clone: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    variables["PATH"] = f"{clone / '.venv' / 'bin'}:{variables['PATH']}"
    subprocess.run(["make", "quickstart"], cwd=clone, env=variables, check=True, timeout=3600)
    failing, servers = [], []
    try:
        for block in read_blocks():
            if not block.runs:
                continue
            program = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
            if block.mark == "run in the background":
                servers.append(subprocess.Popen([*program, block.code], cwd=clone, env=variables))
                wait_for_server(servers[-1])
                continue
            done = subprocess.run(
                [*program, block.as_run()],
                check=False,
                cwd=clone,
                env=variables,
                capture_output=True,
                text=True,
                timeout=3600,
            )
            if done.returncode:
                failing.append(
                    f"{block.place}: exit code {done.returncode}\n{done.stdout[-500:]}\n{done.stderr[-1500:]}"
                )
    finally:
        for server in servers:
            server.terminate()
            server.wait(PATIENCE_SECONDS)
        shutil.rmtree(clone / "runs", ignore_errors=True)
    assert not failing, "\n\n".join(failing)


def wait_for_server(server: subprocess.Popen) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(ADDRESS, timeout=PATIENCE_SECONDS).close()
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"the server ended with {server.poll()} or did not answer")
