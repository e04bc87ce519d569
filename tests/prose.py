"""Words and lengths of the pages: `python tests/prose.py [PAGE ...]` prints what breaks a rule and exits with 1 if anything does.

The rules are the word list in CONTRIBUTING.md: in each row, the code spans of the first column are patterns that pages do
not use, and the second column is what to write instead. A pattern is a regular expression for whole words, in any case;
the names of `WORDS` stand for alternatives. Code, link targets and the pages of `EXEMPT` are not checked. Paragraphs and
list items have at most `LONGEST` characters.

A file of our own because the kept linters do not fit: vale's packages download a binary from GitHub at their first call, and
proselint checks its own rules only.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = ("*.md", "docs/**/*.md", "examples/**/*.md", "recipes/**/*.md")
# What was measured stays as it was written.
EXEMPT = ("docs/log/", "docs/benchmarks/")
LONGEST = 700  # about six lines of a browser
HEADING = "## Words"
WORDS = {
    "MEASURE": "tokens|bytes|bits|nats|numbers|weights|FLOPs|operations|multiply-adds|steps|pairs|samples|lines|hours|minutes"
    "|seconds|[kKMG]i?B|one|memory|files?|line|collective|core|requests?|times|choices|pieces|runs|registers|launches",
    "UNIT": "(?:parameter|token|byte|second|minute|hour|day|step|rank|node|host|GPU|head|layer|block|thread|file|function"
    "|sample|expert|channel|seed|run|dtype|word|row|group|page|stage|element|document|operation|folder|class|key|axis)",
}


class Rule(NamedTuple):
    """A pattern that pages do not use, and what to write instead."""

    pattern: re.Pattern[str]
    instead: str


def read_rules(contributing: str) -> list[Rule]:
    """The rows of the table under `HEADING`; `|` inside a pattern is written as `\\|`, as Markdown wants it."""
    section = contributing.split(f"\n{HEADING}\n", 1)[1].split("\n## ", 1)[0]
    rules = []
    for row in re.findall(r"^\| (`.*)$", section, re.MULTILINE):
        habits, instead, *_ = re.split(r"(?<!\\)\|", row)
        for habit in re.findall(r"`([^`]+)`", habits):
            pattern = habit.replace("\\|", "|")
            for name, words in WORDS.items():
                pattern = pattern.replace(name, f"(?:{words})")
            rules.append(Rule(re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE), instead.strip()))
    return rules


def find_blocks(text: str) -> Iterator[tuple[int, str]]:
    """The paragraphs, headings, list items and table rows of a page, with their line numbers and without code or links' targets."""
    block: list[str] = []
    first = 0
    is_code = False
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        if is_fence := line.lstrip().startswith("```"):
            is_code = not is_code
        is_break = is_code or is_fence or not line.strip() or re.match(r"\s*([-*|#>]|\d+\.)\s?", line) is not None
        if is_break and block:
            yield first, strip_code(" ".join(block))
            block = []
        if is_code or is_fence or not line.strip():
            continue
        first = first if block else number
        block.append(line.strip())


def strip_code(block: str) -> str:
    """The block with an empty span for each piece of code, and links as their text."""
    return re.sub(r"\]\([^)]*\)", "]", re.sub(r"(`+).+?\1", "``", block))


def check(page: str, text: str, rules: list[Rule]) -> list[str]:
    """What breaks a rule in a page, one line per finding."""
    found = []
    if page == "CONTRIBUTING.md":  # the word list itself
        start = text.index(f"\n{HEADING}\n")
        end = text.find("\n## ", start + 1)
        text = text[:start] + "\n" * text.count("\n", start, end) + text[end:]
    for line, block in find_blocks(text):
        for rule in rules:
            for match in rule.pattern.finditer(block):
                context = block[max(0, match.start() - 30) : match.end() + 20]
                found.append(f"{page}:{line}: '{match[0]}' in '{context}': write {rule.instead}")
        if len(block) > LONGEST and not block.startswith("|"):
            found.append(f"{page}:{line}: a paragraph of {len(block)} characters, at most {LONGEST}; split it")
    return found


def main(pages: list[str]) -> int:
    """Check the pages that are named, or all that git knows; returns the exit code."""
    rules = read_rules((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    if not pages:
        patterns = [f":(glob){pattern}" for pattern in PAGES]
        listed = subprocess.run(
            ["git", "ls-files", "--", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
        )
        pages = [page for page in listed.stdout.splitlines() if not page.startswith(EXEMPT)]
    found = [finding for page in pages for finding in check(page, (ROOT / page).read_text(encoding="utf-8"), rules)]
    for finding in found:
        print(finding, file=sys.stderr)
    print(f"{len(pages)} pages, {len(rules)} patterns, {len(found)} findings")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
