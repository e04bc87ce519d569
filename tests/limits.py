"""Limits of time that a busy machine would meet: `python tests/limits.py` prints them and exits with 1.

A test that gives up after a minute is red where other programs run, and shows nothing. What a test waits for is given
`PATIENCE_SECONDS` of tests/helpers/patience.py; a number below `SHORTEST` is rejected unless its line says why it has to be short:
`# short: it must end`. Lines are searched, not statements: child programs in strings count too.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHORTEST = 300.0
REASON = "# short: "
_NUMBER = r"(\d[\d_]*(?:\.\d+)?(?:e\d+)?)\b(?! \*)"  # and no product of numbers
LIMITS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # timeout=60, "timeout_seconds": 60, train__timeout_seconds=60, patience: float = 60
        rf"\b\w*(?:timeout|patience|deadline)(?:_seconds|_s)?[\"']?\]?(?:\s*:\s*(?:float|int))?\s*[=:]\s*{_NUMBER}",
        rf"\.(?:wait|join|communicate|result)\(\s*{_NUMBER}\s*\)",
        rf"(?:monotonic|perf_counter|time)\(\) \+ {_NUMBER}",
        rf"\b(?:start_process_group|mark\.timeout)\(\s*{_NUMBER}",
    )
]


def find_limits(source: str) -> Iterator[tuple[int, str]]:
    """Lines of a Python file, from 1 on, with a limit that is too short and has no reason; and what stands there."""
    for number, line in enumerate(source.splitlines(), start=1):
        if REASON in line:
            continue
        found = {match[0] for pattern in LIMITS for match in pattern.finditer(line) if float(match[1]) < SHORTEST}
        yield from ((number, text) for text in sorted(found))


def main() -> int:
    """Check every test that git knows; returns the exit code."""
    command = ["git", "ls-files", "--", ":(glob)tests/**/*.py", ":(glob)examples/**/test_*.py", "conftest.py"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    found = [
        f"{file}:{line}: {text}: a busy machine is slower; use PATIENCE_SECONDS, or give the reason: {REASON}..."
        for file in files
        if file not in ("tests/limits.py", "tests/test_limits.py")
        for line, text in find_limits((ROOT / file).read_text(encoding="utf-8"))
    ]
    for finding in found:
        print(finding, file=sys.stderr)
    print(f"{len(files)} files, {len(found)} limits that are too short")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
