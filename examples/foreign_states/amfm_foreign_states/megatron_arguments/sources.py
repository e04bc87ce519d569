"""Where arguments of Megatron-LM are written: a script, a list of flags, the list in a log, YAML, or a checkpoint.

The flags that a shell script gives to a training program, found without running it.

Assignments, arrays, lists that grow (`+=`), `${NAME:-default}`, `$((sums))`, and branches of `case` are followed; both
branches of an `if` are read, the first assignment stands. What only a shell knows, such as `$1`, stays as it is written.
"""

from __future__ import annotations

import ast
import re
import shlex
from argparse import Namespace
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from amfm.data_pipeline.durable.json_files import read_bounded, understood
from amfm_foreign_states.megatron_arguments.table import Arguments, resolve

MAX_BYTES = 1 << 24
RUN_CONFIG = "run_config.yaml"
# As Megatron-LM prints its arguments: a name, dots, the value.
PRINTED = re.compile(r"^(?:\[[^\]]*\]:?|\d+:)?\s*([A-Za-z_]\w*) \.{3,} (.*?)\s*$", re.MULTILINE)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
WORDS = {"None": None, "True": True, "False": False, "true": True, "false": False, "null": None}
# Sections of Megatron-Bridge's run_config.yaml; a later one stands where two have a name.
SECTIONS = (
    "dist",
    "ddp",
    "logger",
    "checkpoint",
    "tokenizer",
    "dataset",
    "mixed_precision",
    "train",
    "validation",
    "rng",
    "scheduler",
    "optimizer",
    "model",
)
DTYPES = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}


def read_arguments(path: Path) -> Arguments:
    """Read a script, a text of flags, a log, YAML or a checkpoint's folder. Raises ValueError if no flag is found."""
    if path.is_dir():
        found = read_folder(path)
        if found is None:
            raise ValueError(
                f"{path} records no arguments of Megatron-LM: neither common.pt with `args` nor {RUN_CONFIG}; give the script "
                "of the run"
            )
        return found
    text = read_bounded(path, MAX_BYTES).decode("utf-8", errors="replace")
    if path.suffix in (".yaml", ".yml"):
        return of_yaml(text, path)
    printed = PRINTED.findall(text)
    if len(printed) > 10:
        return resolve(str(path), {name: read_value(value) for name, value in printed}, is_record=True)
    flags = pair_flags(find_flags(text))
    if not flags:
        raise ValueError(f"{path} has no flags (--name value) of a training program; give a script or a list of flags")
    return resolve(str(path), flags)


def read_folder(path: Path) -> Arguments | None:
    """The arguments that a checkpoint records, of Megatron-LM, Bridge or Megatron-DeepSpeed; None if it records none."""
    from amfm_foreign_states.megatron.read import COMMON, find_iteration
    from amfm_foreign_states.torch_file import read_common
    from amfm_foreign_states.universal import UniversalFolder, is_universal

    if is_universal(path):
        states = UniversalFolder(path).states()
        return of_record(read_common(states).get("args"), path) if states.is_file() else None
    folder = find_iteration(path)
    if (folder / RUN_CONFIG).is_file():
        return of_yaml(
            read_bounded(folder / RUN_CONFIG, MAX_BYTES).decode("utf-8", errors="replace"), folder / RUN_CONFIG
        )
    return of_record(read_common(folder / COMMON).get("args"), folder / COMMON)


def of_record(args: Any, where: Path) -> Arguments | None:
    """Arguments as a program saved them; values of types that are not read are left out."""
    if not isinstance(args, Namespace):
        return None
    values = {name: plain(value) for name, value in vars(args).items()}
    values["normalization"] = NORMS.get(str(values.get("normalization")), values.get("normalization", NOT_READ))
    if "position_embedding_type" not in values and "use_rotary_position_embeddings" in values:
        values |= of_deepspeed(values)
    return resolve(str(where), {name: value for name, value in values.items() if value is not NOT_READ}, is_record=True)


def of_deepspeed(values: Mapping[str, Any]) -> dict[str, Any]:
    """What Megatron-DeepSpeed calls differently: positions are two flags, experts a list; its converter unpads vocabularies."""
    learned = "learned_absolute" if values.get("add_position_embedding") else "none"
    positions = "rope" if values["use_rotary_position_embeddings"] else learned
    experts = values.get("num_experts")
    dense = {"num_experts": None} if isinstance(experts, list) and set(experts) == {1} else {}
    return {"position_embedding_type": positions, "padded_vocab_size": NOT_READ, "vocab_size": NOT_READ, **dense}


NOT_READ = object()
NORMS = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}


def plain(value: Any) -> Any:
    """A value as YAML would have it; dtypes by their name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return DTYPES.get(str(value), NOT_READ)


def of_yaml(text: str, path: Path) -> Arguments:
    """Megatron-Bridge's run_config.yaml, or flags in a mapping. Raises ValueError for anything else."""
    try:
        with understood(path):
            tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML that is read: {str(error)[:200]}") from error
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path} is not a mapping of arguments")  # noqa: TRY004
    tree = tree.get("MODEL_ARGS", tree)
    if isinstance(tree, Mapping) and isinstance(tree.get("model"), Mapping):
        return resolve(str(path), of_bridge(tree), is_flags=False, is_record=True)
    if not isinstance(tree, Mapping) or not any(str(name).startswith("-") for name in tree):
        raise ValueError(f"{path} has neither flags (`--name: value`) nor the sections of {RUN_CONFIG}")
    return resolve(str(path), {str(name): of_entry(value) for name, value in tree.items() if value is not False})


def of_entry(value: Any) -> Any:
    """A value of a mapping of flags: lists may be texts in brackets, numbers texts."""
    if not isinstance(value, str):
        return value
    inner = value.strip()
    if inner.startswith("[") and inner.endswith("]") and not set(inner) <= set("[]()+*, 0123456789"):
        return [read_value(word) for word in inner[1:-1].split()]
    return read_value(inner)


def of_bridge(tree: Mapping[str, Any]) -> dict[str, Any]:
    """All sections as one mapping. A function is given by its name (`_target_`)."""
    found: dict[str, Any] = {}
    for section in SECTIONS:
        entries = tree.get(section)
        for name, value in entries.items() if isinstance(entries, Mapping) else ():
            if isinstance(value, Mapping):
                value = value.get("_target_")
            if name not in ("_target_", "params_dtype") and value is not None:
                found[str(name)] = value
    model = tree["model"]
    found["swiglu"] = bool(model.get("gated_linear_unit")) and "silu" in str(found.get("activation_func", ""))
    if "bf16" in str(tree.get("mixed_precision")):
        found.setdefault("bf16", True)
    return found


def pair_flags(words: list[str]) -> dict[str, Any]:
    """Flags with their values: one, several as a list, or true if none follows."""
    found: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--") and len(word) > 2 and not word[2].isdigit():
            name, has_value, value = word.partition("=")
            found[name] = read_value(value) if has_value else True
        elif name and not re.fullmatch(r"\||&&?|>>?.*|2>&1|\d?>.*|tee|;", word):
            before = found[name]
            value = read_value(word)
            found[name] = value if before is True else [*(before if isinstance(before, list) else [before]), value]
        else:
            name = ""
    return found


def read_value(text: str) -> Any:
    """A number, a truth or a text."""
    if text in WORDS:
        return WORDS[text]
    if NUMBER.fullmatch(text):
        return float(text) if set(text) & set(".eE") else int(text)
    if text.startswith("[") and text.endswith("]") and "'" in text:
        return [read_value(part.strip().strip("'\"")) for part in text[1:-1].split(",")]
    return text


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
