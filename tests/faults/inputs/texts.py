"""Bad configurations, patterns, overrides and texts."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from amfm.pretrain.config.errors import Problem
from amfm.pretrain.config.yaml_tree import read_tree
from tests.faults.inputs.trial import Case

SEED = 52
PATTERNS = (
    *("", " ", "M", "m", "MM", "Q", "()", "(", ")", ")(", "((M)", "(M))", "(M)*", "(M)*0", "(M)*-1", "(M)*1.5", "(M)*x", "*", "**"),
    *("(M)*99999999", "((((M)*9999)*9999)*9999)*9999", "M*E-", "M E", "M\tE", "M\nE", "M/E", "/", "//", "M//E", "M/", "&", "M&", "&M"),
    *("M&E", "{", "}", "{}", "{retnet", "{retnet}", "{nothing}", "{retnet}&W", "{retnet:}", "é", "漢", "M\0E", "\ud800", "M" * 100_000),
    *("(" * 5000, "(" * 64 + "M" + ")" * 64, "(" * 65 + "M" + ")" * 65, "M;E", "$(id)", "`id`", "../M", "M#E", "# M", "~", "null"),
)  # fmt: skip
OVERRIDES = (
    *("", "=", "a", "=1", "a=", "a=1", "train", "train=", "train=1", "train=[]", "train={}", "train=null", "train.steps"),
    *("train.steps=", "train.steps=x", "train.steps=1.5", "train.steps=-1", "train.steps=0", "train.steps=1e400", "train.steps=.nan"),
    *("train.steps=" + "9" * 5000, "train.steps=[1]", "train.steps={a: 1}", "train.steps=true", "train.steps=null", "train..steps=1"),
    *(".train.steps=1", "train.steps.=1", "train.steps.x=1", "train.step=1", "TRAIN.STEPS=1", "train.steps==1", "train.steps= 1 "),
    *("train.steps=1\n", "train.steps=1\n2", "train.steps=\0", "train.steps='1", 'train.steps="1', "train.steps=[", "train.steps={"),
    *("train.steps=&a [*a]", "train.steps=*a", "train.steps=!!python/object:os.system x", "train.steps=" + "[" * 3000, "train.steps=é"),
    *("é=1", "data.sources.0.weight=-1", "data.sources.9.weight=1", "data.sources.-1.weight=1", "data.sources.x.weight=1"),
    *("data.sources=[]", "data.sources.0=null", "data.sources.0.paths=[]", "data.sources.0.paths=['']", "model.pattern="),
    *("model.hidden_size=1", "model.vocab_size=0", "optimizer.learning_rate=inf", "optimizer.learning_rate=-0", "extends=x.yaml"),
    *("run.dir=", "run.dir=\0", "run.dir=" + "x" * 5000, "run.dir=[a]", "x" * 100_000 + "=1"),
)  # fmt: skip
ODD_VALUES = ("null", "[]", "{}", "''", "-1", "0", "9223372036854775808", "1e308", ".inf", "true", "[[]]", "x", "'\\0'", "1.5", "[1, 2]", "../../x", "" + "9" * 400)  # fmt: skip


def overrides(place: Path) -> Iterator[Case]:
    base = str(place / "run.yaml")
    yield from (Case(f"override {word[:40]!r}", ("config", base, word)) for word in OVERRIDES)


def patterns(place: Path) -> Iterator[Case]:
    base = str(place / "run.yaml")
    for number, pattern in enumerate(PATTERNS):

        def make(here: Path, pattern: str = pattern) -> None:
            text = json.dumps({"extends": base, "model": {"pattern": pattern}})
            (here / "run.yaml").write_text(text)

        yield Case(f"pattern {number} {pattern[:30]!r} in a file", ("config", "HERE/run.yaml"), make)
        yield Case(f"pattern {number} {pattern[:30]!r}", ("config", base, f"model.pattern={pattern}"))


def settings(place: Path) -> Iterator[Case]:
    """A random part of every setting with every odd value."""
    problems: list[Problem] = []
    keys = sorted(read_tree(place / "run.yaml", problems).origins())
    pairs = [(key, value) for key in keys if key for value in ODD_VALUES]
    for key, value in random.Random(SEED).sample(pairs, 313):
        yield Case(f"{key}={value}", ("config", str(place / "run.yaml"), f"{key}={value}", "--ranks", "2"))


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 10)}]" for number in range(1, levels)]
    return "\n".join(lines) + "\n"


def contents(base: str) -> dict[str, bytes | str]:
    """Texts instead of a configuration, by name."""
    changed = {
        "BOM": "\ufeff" + base,
        "CRLF": base.replace("\n", "\r\n"),
        "CR": base.replace("\n", "\r"),
        "UTF-16": base.encode("utf-16"),
        "UTF-16 without a mark": base.encode("utf-16-le"),
        "latin-1": (base + "# é\n").encode("latin-1"),
        "NUL": base + "\0",
        "a tab": base.replace("  ", "\t", 3),
        "half": base[: len(base) // 2],
        "twice": base + base,
        "two documents": base + "---\n" + base,
        "5000 digits": base.replace("steps: 4", "steps: " + "9" * 5000),
        "a long line": base + "# " + "x" * 900_000,
        "above the limit": base + "# " + "x" * (1 << 20),
    }
    alone = (
        *("", "\n", "# nothing", "null", "1", "text", "- a", "[]", "{}", "---", "...", "%YAML 2.0\n---\na: 1", "%TAG ! x:\n---\n!a b"),
        *("a: 'x", 'a: "x', "a: {", "a: [", "a: }", "a: b: c", "a: |\n x\n  y\n z", "? [a]\n: 1", "{[a]: 1}", "1: 2", "null: 1", "true: 1"),
        *("a: *b", "a: &a [*a]", "a: &a {b: *a}", "<<: {a: 1}", "a: &a {x: 1}\nb: {<<: *a}", "a: !!binary aGk=", "a: !mine b"),
        *("a: !!python/object/apply:os.system [id]", "!!python/name:os.system", "a: !!str 240", "a: \"\\ud800\"", "a: \"\\x00\"", "\x1b[31m"),
        *("run: 1", "run: []", "run: null", "run: {dir: 1}", "runs: {}", "train: {steps: 1:30}", "extends: null", "extends: []"),
        *("extends: ''", "extends: run.yaml", "extends: missing.yaml", "extends: .", 'extends: "a\\0b"', "extends: /dev/null"),
        *("[" * 1000, "[" * 100_000, "a:\n" * 1, "- " * 20_000, "{a: " * 1000, "- 1\n" * 100_001, "x" * 1_000_000 + ": 1", bomb(9), bomb(4)),
    )  # fmt: skip
    return changed | {repr(text[:40]): text for text in alone}


def files(place: Path) -> Iterator[Case]:
    base = (place / "run.yaml").read_text()
    for name, content in contents(base).items():

        def make(here: Path, content: bytes | str = content) -> None:
            (here / "run.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())

        yield Case(f"file {name}", ("config", "HERE/run.yaml"), make)
    specials: dict[str, Callable[[Path], Any]] = {
        "folder": Path.mkdir,
        "pipe": os.mkfifo,
        "dangling link": lambda path: path.symlink_to("nothing"),
        "link to itself": lambda path: path.symlink_to(path.name),
        "/dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "/dev/full": lambda path: path.symlink_to("/dev/full"),
        "nothing": lambda path: None,
        "chain of 1,200": chain,
    }
    for name, special in specials.items():
        yield Case(
            f"file {name}", ("config", "HERE/run.yaml"), lambda here, special=special: special(here / "run.yaml")
        )  # type: ignore[misc]


def chain(path: Path) -> None:
    for number in range(1200):
        (path.parent / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    path.write_text("extends: 0.yaml\n")


def lines_of(number: int) -> bytes:
    return b"".join(b'{"text": "document %d of some words"}\n' % index for index in range(number))


def texts() -> dict[str, bytes]:
    """Content by name of a source's file."""
    good = lines_of(60)
    packed = gzip.compress(good)
    found: dict[str, bytes] = {
        "a.jsonl": good,
        "empty.jsonl": b"",
        "newlines.jsonl": b"\n" * 5000,
        "bom.jsonl": b"\xef\xbb\xbf" + good,
        "crlf.jsonl": good.replace(b"\n", b"\r\n"),
        "cr.jsonl": good.replace(b"\n", b"\r"),
        "utf16.jsonl": good.decode().encode("utf-16"),
        "latin.jsonl": '{"text": "é"}\n'.encode("latin-1") * 60,
        "binary.jsonl": random.Random(1).randbytes(50_000),
        "binary.txt": random.Random(2).randbytes(50_000),
        "zeros.jsonl": b"\0" * 50_000,
        "zeros.txt": b"\0" * 50_000,
        "array.jsonl": json.dumps([{"text": "x"}] * 60, indent=1).encode(),
        "one-line.jsonl": json.dumps([{"text": "x"}] * 60).encode(),
        "deep.jsonl": b'{"text": ' + b"[" * 1_000_000 + b"\n" + good,
        "digits.jsonl": b'{"text": "a", "n": ' + b"9" * 100_000 + b"}\n" + good,
        "surrogates.jsonl": b'{"text": "\\ud800"}\n' + good,
        "pair.jsonl": b'{"text": "\\ud83d\\ude00"}\n' + good,
        "nul.jsonl": b'{"text": "a\\u0000b"}\n' + good,
        "twice.jsonl": b'{"text": "a", "text": "b"}\n' + good,
        "nan.jsonl": b'{"text": "a", "n": NaN}\n' + good,
        "cut.jsonl": good[:-20],
        "csv.jsonl": b"text,number\nsome words,1\n" * 60,
        "spaces.txt": b" " * 50_000,
        "control.txt": bytes(range(32)) * 100,
        "long-word.txt": b"x" * 300_000,
        "emoji.txt": "😀👩‍👩‍👧‍👦".encode() * 2000,
        "bidi.txt": "\u202e\u200b\ufeff".encode() * 2000,
        "a.md": b"# title\n" * 100,
        "cut.jsonl.gz": packed[:-30],
        "crc.jsonl.gz": packed[:-8] + b"\0" * 8,
        "members.jsonl.gz": packed + packed,
        "garbage-behind.jsonl.gz": packed + b"garbage",
        "no.jsonl.gz": good,
        "empty.jsonl.gz": b"",
        "twice-packed.jsonl.gz": gzip.compress(packed),
        "no.jsonl.zst": good,
        "empty.jsonl.zst": b"",
        "text.parquet": good,
        "empty.parquet": b"",
        "marks.parquet": b"PAR1" + b"\0" * 100 + b"PAR1",
        "text.arrow": good,
        "empty.arrow": b"",
        "alone.idx": b"MMIDIDX\0\0",
        "name with\nnewline.jsonl": good,
        "[a]*?.jsonl": good,
        "-x.jsonl": good,
        "no-suffix": good,
        "a.csv": good,
        "a.pkl": good,
        "a.jsonl.bz2": good,
    }
    values: tuple[Any, ...] = (None, 1, 1.5, True, [], {}, ["a"], {"text": "a"}, "", " ", "\n", "x" * 200_000)
    found |= {f"value-{n}.jsonl": json.dumps({"text": value}).encode() + b"\n" + good for n, value in enumerate(values)}
    records: tuple[Any, ...] = (None, 1, "a", [], {}, {"other": "a"}, {"Text": "a"}, {"text ": "a"})
    return found | {f"record-{n}.jsonl": json.dumps(record).encode() + b"\n" + good for n, record in enumerate(records)}


def tables() -> dict[str, pyarrow.Table]:
    """Tables with columns of many types."""
    now = datetime(2026, 1, 1, tzinfo=UTC)
    columns: tuple[Any, ...] = (
        *([1, 2], [1.5, None], [True, False], [None, None], [b"ab", b"\xff\xfe"], [["a"], []], [{"text": "a"}, None]),
        *([now, now], pyarrow.array(["a", "b"]).dictionary_encode(), pyarrow.array(["a", "b"], pyarrow.large_string())),
        *(pyarrow.array([], pyarrow.string()), pyarrow.array(["a", None]), pyarrow.array(["a", "b"], pyarrow.string_view())),
    )  # fmt: skip
    found = {f"column-{number}": pyarrow.table({"text": column}) for number, column in enumerate(columns)}
    found["no-columns"] = pyarrow.table({})
    found["other"] = pyarrow.table({"other": ["a"]})
    found["twice"] = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    return found


def prepare(here: str, *changes: str) -> tuple[str, ...]:
    """Words that prepare the folder `text` of a case with the tokenizer of the sound store."""
    place = here.rpartition("/")[0] or here
    tokenizer = f"data.tokenizer={{model: {place}/store/tokenizer.model}}"
    given = changes or ("data.sources=[{name: a, paths: [HERE/text]}]",)
    return ("prepare", f"{place}/run.yaml", "data.store=HERE/out", tokenizer, "data.prepare.num_actors=null", *given)


def sources(place: Path) -> Iterator[Case]:
    words = prepare(str(place / "case"))
    for name, content in texts().items():

        def make(here: Path, name: str = name, content: bytes = content) -> None:
            (here / "text").mkdir()
            (here / "text" / name).write_bytes(content)

        yield Case(f"source {name!r}", words, make)
    for name, table in tables().items():
        for suffix in ("parquet", "arrow"):

            def make_table(here: Path, name: str = f"{name}.{suffix}", table: pyarrow.Table = table) -> None:
                (here / "text").mkdir()
                path = here / "text" / name
                if name.endswith("parquet"):
                    if "string_view" not in str(table.schema):
                        pyarrow.parquet.write_table(table, path)
                else:
                    with pyarrow.ipc.new_stream(path, table.schema) as stream:
                        stream.write_table(table)

            yield Case(f"source {name}.{suffix}", words, make_table)
    yield from settings_of_sources(place)


def settings_of_sources(place: Path) -> Iterator[Case]:
    """Sound text under settings that do not fit it, and paths that are not."""

    def make(here: Path) -> None:
        (here / "text").mkdir()
        (here / "text" / "a.jsonl").write_bytes(lines_of(60))
        os.mkfifo(here / "pipe.txt")
        (here / "loop").symlink_to("loop")
        (here / "folder").mkdir()

    paths = ("HERE/none", "HERE/folder", "HERE/pipe.txt", "HERE/loop", "/dev/zero", "/dev/null", "", ".", "..", "HERE/text/*.txt", "HERE/**", "http://[", "s3://", "hub:", "hub:a", "file:///x", "HERE/text/a.jsonl/x", "x" * 5000)  # fmt: skip
    given = [f"data.sources=[{{name: a, paths: [{json.dumps(path)}]}}]" for path in paths]
    given += [
        f"data.sources=[{{name: a, paths: [HERE/text], {more}}}]"
        for more in ("text_column: other", "text_column: ''", "max_bytes: 1", "max_tokens: 1", "filters: {min_characters: 100000}",
                     "filters: {keep_pattern: '('}", "filters: {drop_pattern: '.'}", "filters: {keep_pattern: '(a+)+$'}", "weight: 0")
    ]  # fmt: skip
    for change in given:
        yield Case(f"source with {change[:80]}", prepare(str(place / "case"), change), make)
