"""The flags that a shell script gives to a training program, found without running it.

Assignments, arrays, lists that grow (`+=`), `${NAME:-default}`, `$((sums))`, and branches of `case` are followed; both
branches of an `if` are read, the first assignment stands. What only a shell knows, such as `$1`, stays as it is written.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from fnmatch import fnmatchcase

ASSIGNED = re.compile(r"(?:export\s+|local\s+|declare\s+(?:-\w+\s+)*)?([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)(?:\[[@*]\])?(?::?-([^{}]*))?\}|\$([A-Za-z_]\w*)")
SUM = re.compile(r"\$\(\(([^()]*(?:\([^()]*\))*[^()]*)\)\)")
COMMENT = re.compile(r"(?:^|(?<=\s))#[^\n]*")
# Quoted texts, which may have semicolons, ends of statements, and the rest.
TOKEN = re.compile(r"""\"(?:\\.|[^\"\\])*\"|'[^']*'|;;|;|[^;\"']+|[\"']""", re.DOTALL)
MAX_TEXT = 1 << 20
MAX_ROUNDS = 20


def find_flags(text: str) -> list[str]:
    """The words after the program's name, or all that are assigned if no program is called."""
    values: dict[str, str] = {}
    commands = [split(expand(part, values)) for part in read_statements(text, values)]
    assigned = [split(expand(value, values)) for value in values.values()]
    for words in reversed([*assigned, *commands]):
        programs = [index for index, word in enumerate(words) if word.endswith(".py")]
        if programs and any(word.startswith("--") for word in words[programs[-1] :]):
            return words[programs[-1] + 1 :]
    lists = [words for words in assigned if any(word.startswith("--") for word in words)]
    return [word for words in lists or commands for word in words]


def read_statements(text: str, values: dict[str, str]) -> Iterator[str]:
    """Iterate over all but assignments, which are noted."""
    choice: list[tuple[str, bool, bool]] = []  # of each open case: its word, whether this branch runs, whether one did
    depth = 0
    for statement in statements(text):
        if opened := re.match(r"case\s+(.+?)\s+in\b", statement):
            choice.append((expand(opened[1], values).strip("\"'"), False, False))
            continue
        if choice and statement == "esac":
            choice.pop()
            continue
        if choice and statement == ";;":
            word, _, is_done = choice[-1]
            choice[-1] = (word, False, is_done)
            continue
        if (
            choice
            and (label := re.match(r"\(?\s*([^()\s][^()]*?)\)\s*(.*)", statement, re.DOTALL))
            and not choice[-1][1]
        ):
            word, _, is_done = choice[-1]
            fits = not is_done and any(fnmatchcase(word, each.strip().strip("\"'")) for each in label[1].split("|"))
            choice[-1] = (word, fits, is_done or fits)
            statement = label[2]
        if not statement or not all(runs for _, runs, _ in choice):
            continue
        depth += bool(re.match(r"if\b", statement)) - (statement == "fi")
        statement = re.sub(r"^(then|else|do)\s+", "", statement)
        if found := ASSIGNED.fullmatch(statement):
            note(found[1], found[2], found[3], values, is_sure=depth <= 0)
        else:
            yield statement


def note(name: str, plus: str, written: str, values: dict[str, str], *, is_sure: bool) -> None:
    """Note an assignment; of two branches of an `if` the first stands."""
    value = written.strip()
    if value.startswith("("):
        value = value[1:].rstrip().removesuffix(")")
    elif len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1]
    value = expand(value, values)
    if plus:
        values[name] = f"{values.get(name, '')} {value}"
    elif is_sure or name not in values or name in written:
        values[name] = value


def statements(text: str) -> Iterator[str]:
    """Iterate over statements: lines, joined where a quote or a parenthesis is open."""
    text = COMMENT.sub("", text[:MAX_TEXT]).replace("\\\n", " ")
    waiting = ""
    for line in text.splitlines():
        waiting = f"{waiting}\n{line}" if waiting else line
        if is_open(waiting):
            continue
        part = ""
        for token in [*TOKEN.findall(waiting), ";"]:
            if token not in (";", ";;"):
                part += token
                continue
            if part.strip():
                yield part.strip()
            if token == ";;":
                yield token
            part = ""
        waiting = ""
    if waiting.strip():
        yield waiting.strip()


def is_open(text: str) -> bool:
    """Whether a quote, or the list of an array, has no end yet."""
    quote = ""
    depth = 0
    for before, char in zip(" " + text, text):
        if quote:
            quote = "" if char == quote and before != "\\" else quote
        elif char in "\"'":
            quote = char
        elif char == "(" and (depth or before in "=$("):
            depth += 1
        elif char == ")" and depth:
            depth -= 1
    return bool(quote) or depth > 0


def expand(text: str, values: dict[str, str]) -> str:
    """The text with names replaced by what they are, as far as that is known."""

    def known(found: re.Match[str]) -> str:
        value = values.get(found[1] or found[3])
        return value if value is not None else found[2].strip("\"'") if found[2] is not None else found[0]

    for _ in range(MAX_ROUNDS):
        changed = SUM.sub(lambda found: add(VARIABLE.sub(known, found[1]), found[0]), VARIABLE.sub(known, text))
        if changed == text or len(changed) > MAX_TEXT:
            break
        text = changed
    return text[:MAX_TEXT]


def add(text: str, otherwise: str) -> str:
    """The value of a sum of integers, else the text as it was."""
    if not re.fullmatch(r"[\d\s+*/()-]{1,200}", text):
        return otherwise
    try:
        return str(_whole(ast.parse(text.strip(), mode="eval").body))
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return otherwise


def _whole(node: ast.expr) -> int:
    """The value of a tree of integers."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_whole(node.operand)
    if not isinstance(node, ast.BinOp):
        raise SyntaxError("no sum")  # noqa: TRY004
    left, right = _whole(node.left), _whole(node.right)
    match node.op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.FloorDiv() | ast.Div():
            return left // right
        case _:
            raise SyntaxError("no sum")


def split(text: str) -> list[str]:
    """Words as a shell splits them; where quotes have no end, at spaces."""
    try:
        words = shlex.split(text)
    except ValueError:
        return text.split()
    # A flag and its value may be quoted together, in a list that is joined later.
    return [part for word in words for part in (word.split() if "--" in word and re.search(r"\s", word) else [word])]
