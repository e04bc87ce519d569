"""Words of pages and of Python, lengths of paragraphs: `python tests/prose.py [FILE ...]` prints what breaks a rule and exits with 1.

The rules are the word list in CONTRIBUTING.md: in each row, the code spans of the first column are patterns that are not
used, and the second column is what to write instead. A pattern is a regular expression for whole words, in any case; the
names of `WORDS` stand for alternatives. In pages, code, link targets and the files of `EXEMPT` are not checked, and
paragraphs and list items have at most `LONGEST` characters. In Python, comments, docstrings and strings of several words
are checked (help, messages, descriptions of settings), without code spans and the expressions of f-strings. Rows whose
third column begins with `SHOWN` apply to what users see: pages, and strings of the product and of benchmarks that are no
docstrings. In YAML, scripts and the Makefile comments and echoed words are checked. Names of files, functions, classes and arguments of the
product are split at `_`, and the words of `MOST_NAMES` are counted: falling only.

A file of our own because the kept linters do not fit: vale's packages download a binary from GitHub at their first call, and
proselint checks its own rules only.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = ("**/*.md",)
COMMENTED = ("**/*.yaml", "**/*.yml", "**/*.sh", "Makefile", "Dockerfile", "pyproject.toml")
# Texts that models continue in tests and checks.
PROMPTS = ("examples/clients/amfm_clients/check.py", "tests/pretrain/export/habits/trainer.py")
# Of a month, and a tokenizer's text, which stay as they were written.
EXEMPT = (
    "docs/log/",
    "tests/data_pipeline/tokenizer/test_tiktoken.py",
    "tests/prose.py",
    "tests/test_prose.py",
    *PROMPTS,
)
LONGEST = 700  # about six lines of a browser
HEADING = "## Words"
SHOWN = "*pages*"
# From Python 3.12 on an f-string is several tokens.
STRINGS = {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
WORDS = {
    "MEASURE": "tokens|bytes|bits|nats|numbers|weights|FLOPs|operations|multiply-adds|steps|pairs|samples|lines|hours|minutes"
    "|seconds|[kKMG]i?B|one|memory|files?|line|collective|core|requests?|choices|pieces|registers|programs?|gates?",
    "UNIT": "(?:parameter|token|byte|second|minute|hour|day|step|rank|node|host|GPU|head|layer|block|thread|file|function"
    "|sample|expert|channel|seed|run|dtype|word|row|group|page|stage|element|document|operation|folder|class|key|axis)",
}

PRODUCT = ("launch/", "pretrain/", "model/", "kernels/", "data_pipeline/")
# Words that names of the product should not have, and how many still have them; lower them when they can be.
MOST_NAMES = {
    "again": 0,
    "anew": 0,
    "beside": 0,
    "card": 2,
    "cards": 3,
    "dispatched": 0,
    "hang": 1,
    "hear": 0,
    "hears": 0,
    "land": 0,
    "landed": 0,
    "lands": 0,
    "learn": 0,
    "learns": 0,
    "look": 0,
    "looks": 0,
    "mend": 0,
    "mended": 0,
    "news": 0,
    "remade": 0,
    "room": 0,
    "rooms": 0,
    "says": 0,
    "settle": 0,
    "tell": 1,
    "tells": 0,
    "told": 0,
    "way": 0,
}


class Rule(NamedTuple):
    """A pattern that is not used, what to write instead, and whether the rule is only for what users see."""

    pattern: re.Pattern[str]
    instead: str
    for_shown: bool


def read_rules(contributing: str) -> list[Rule]:
    """The rows of the table under `HEADING`; `|` inside a pattern is written as `\\|`, as Markdown wants it."""
    section = contributing.split(f"\n{HEADING}\n", 1)[1].split("\n## ", 1)[0]
    rules = []
    for row in re.findall(r"^\| (`.*)$", section, re.MULTILINE):
        habits, instead, example, *_ = re.split(r"(?<!\\)\|", row)
        for habit in re.findall(r"`([^`]+)`", habits):
            pattern = habit.replace("\\|", "|")
            for name, words in WORDS.items():
                pattern = pattern.replace(name, f"(?:{words})")
            whole_words = re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE)
            rules.append(Rule(whole_words, instead.strip(), example.strip().startswith(SHOWN)))
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


def find_words(source: str) -> Iterator[tuple[int, str, bool]]:
    """The comments, docstrings and strings of several words of a Python file, their line numbers, and whether users see them.

    Without code spans, paths, flags, tags of HTML, and of f-strings without their expressions.
    """
    bare = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr)]
    docstrings = {node.lineno for node in bare if isinstance(node, ast.Constant)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT or (token.type in STRINGS and " " in token.string):
            text = re.sub(r"(`+)[^`]*\1|\{[^{}]*\}|<[^>]*>|--\w+|\S*[/_]\S*|\w+\.\w[\w.]*", "``", token.string)
            is_message = token.type in STRINGS and token.start[0] not in docstrings
            yield token.start[0], " ".join(text.replace("# ", "").split()), is_message


def find_comments(text: str) -> Iterator[tuple[int, str, bool]]:
    """The comments of a file whose comments begin with `#`, and what its commands echo, without code, paths and flags."""
    for number, line in enumerate(text.splitlines(), start=1):
        for comment, echoed in re.findall(r"(?:^|\s)#(?!!)\s*(.*)|\becho (?:-e )?[\"']([^\"']*)", line):
            words = re.sub(r"(`+)[^`]*\1|--\w[\w-]*|\S*[/_=$]\S*|\w+\.\w[\w.]*", "``", comment or echoed)
            yield number, words, bool(echoed)


def find_habits(file: str, line: int, block: str, rules: list[Rule]) -> Iterator[str]:
    """What breaks a rule in a block of words, one line per finding."""
    for rule in rules:
        for match in rule.pattern.finditer(block):
            context = block[max(0, match.start() - 30) : match.end() + 20]
            yield f"{file}:{line}: '{match[0]}' in '{context}': write {rule.instead}"


def check_source(file: str, source: str, rules: list[Rule]) -> list[str]:
    """What breaks a rule in the words of a file of code, one line per finding."""
    some = [rule for rule in rules if not rule.for_shown]
    blocks = find_words(source) if file.endswith(".py") else find_comments(source)
    has_users = file.startswith((*PRODUCT, "benchmarks/", "recipes/", "Makefile"))
    return [
        finding
        for line, block, is_message in blocks
        for finding in find_habits(file, line, block, rules if is_message and has_users else some)
    ]


def check(page: str, text: str, rules: list[Rule]) -> list[str]:
    """What breaks a rule in a page, one line per finding."""
    found = []
    if page == "CONTRIBUTING.md":  # the word list itself
        start = text.index(f"\n{HEADING}\n")
        end = text.find("\n## ", start + 1)
        text = text[:start] + "\n" * text.count("\n", start, end) + text[end:]
    for line, block in find_blocks(text):
        found += find_habits(page, line, block, rules)
        if len(block) > LONGEST and not block.startswith("|"):
            found.append(f"{page}:{line}: a paragraph of {len(block)} characters, at most {LONGEST}; split it")
    return found


def words_of_names(page: str, source: str) -> Iterator[str]:
    """Words of a file's name, and of the names of its functions, classes and arguments, in small letters."""
    names = [PurePosixPath(page).stem]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.arg):
            names.append(node.arg)
    for name in names:
        yield from re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_")


def check_names(counts: Counter[str]) -> list[str]:
    """Words that more names have than did."""
    return [
        f"names of the product have {word!r} in {counts[word]} places, at most {most}: CONTRIBUTING.md has better words"
        for word, most in MOST_NAMES.items()
        if counts[word] > most
    ]


def main(pages: list[str]) -> int:
    """Check the files that are named, or all that git knows; returns the exit code."""
    rules = read_rules((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    if not pages:
        patterns = [f":(glob){pattern}" for pattern in (*PAGES, *COMMENTED, "**/*.py")]
        listed = subprocess.run(
            ["git", "ls-files", "--", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
        )
        pages = [page for page in listed.stdout.splitlines() if not page.startswith(EXEMPT)]
    found = []
    counts: Counter[str] = Counter()
    for page in pages:
        text = (ROOT / page).read_text(encoding="utf-8")
        check_file = check if page.endswith(".md") else check_source
        found += check_file(page, text, rules)
        if page.startswith(PRODUCT) and page.endswith(".py"):
            counts.update(words_of_names(page, text))
    found += check_names(counts)
    for finding in found:
        print(finding, file=sys.stderr)
    print(f"{len(pages)} files, {len(rules)} patterns, {len(found)} findings")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
