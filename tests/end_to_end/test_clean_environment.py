"""The two commands of a fresh clone for someone who has nothing: no caches, no compiler, another home, the PATH of a plain Debian."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = re.compile(r"(.*-)?(cc|c\+\+|gcc|g\+\+|clang|clang\+\+|c89|c99)(-[\d.]+)?")
# How an index of packages is reached: of the machine, and not of a user's settings.
NETWORK = re.compile(r"PIP_.*|.*_proxy|.*_PROXY|SSL_CERT_.*|REQUESTS_CA_BUNDLE")
# The quickstart with fewer steps.
SHORTER = {
    "steps: 240": "steps: 8",
    "checkpoint_every_steps: 80": "checkpoint_every_steps: 4",
    "validate_every_steps: 40": "validate_every_steps: 4",
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the programs of the system, compilers left out."""
    folder = tmp_path_factory.mktemp("programs")
    for place in (Path("/usr/bin"), Path("/bin")):
        for program in place.iterdir():
            if not COMPILER.fullmatch(program.name) and not (folder / program.name).is_symlink():
                (folder / program.name).symlink_to(program)
    return folder


def test_a_fresh_clone_runs_the_quickstart_and_tests_with_what_make_installs(programs: Path, tmp_path: Path) -> None:
    home, clone = tmp_path / "Heim Jörg", tmp_path / "Mein Ördner" / "amfm"
    home.mkdir()
    network = {name: value for name, value in os.environ.items() if NETWORK.fullmatch(name)}
    environment = {"HOME": str(home), "PATH": str(programs), "LANG": "C.UTF-8", **network}

    def run(*command: str | Path) -> str:
        words = [str(word) for word in command]
        done = subprocess.run(words, cwd=clone, env=environment, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    python = sys._base_executable  # type: ignore[attr-defined]
    asked = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(home / "asked"), "packaging"]
    if subprocess.run(asked, env=environment, check=False, capture_output=True).returncode:
        pytest.skip("no index of packages is in reach")
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    config = clone / "configs" / "tiny_cpu.yaml"
    text = config.read_text(encoding="utf-8")
    for full, short in SHORTER.items():
        assert full in text
        text = text.replace(full, short)
    config.write_text(text, encoding="utf-8")

    said = run("make", f"PYTHON={python}", "quickstart")
    assert "3.3 GB to download" in said and "amfm init my" in said.splitlines()[-1]
    for made in ("exports/tiny_cpu/config.json", "runs/tiny_cpu/report.html"):
        assert (clone / made).is_file()
    assert not (clone / ".venv" / "temporary").exists()
    run("make", f"PYTHON={python}", ".venv/.installed-dev")
    run(".venv/bin/python", "-m", "pytest", "tests/launch/test_presets.py", "tests/data_pipeline/test_terminal.py")
    run(".venv/bin/ruff", "check", ".")
