"""Damaged folders: training states and models to import, run directories and stores."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from amfm.pretrain.launcher_protocol import BAD_INPUT, DONE, RUN_FAILED
from tests.faults.fuzz import ODD
from tests.faults.inputs.trial import Case

SEED = 52
# What is done to one file of a folder, by name.
DAMAGE: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a byte less": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
    "random": lambda path: path.write_bytes(random.Random(SEED).randbytes(5000)),
    "null": lambda path: path.write_bytes(b"null"),
    "a list": lambda path: path.write_bytes(b"[]"),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\0"),
    "a folder": lambda path: replace(path, Path.mkdir),
    "a pipe": lambda path: replace(path, os.mkfifo),
    "a dangling link": lambda path: replace(path, lambda link: link.symlink_to("nothing")),
    "a link to itself": lambda path: replace(path, lambda link: link.symlink_to(link.name)),
    "/dev/zero": lambda path: replace(path, lambda link: link.symlink_to("/dev/zero")),
}  # fmt: skip


def replace(path: Path, special: Callable[[Path], Any]) -> None:
    path.unlink()
    special(path)


def flip(path: Path, seed: int) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[random.Random(seed).randrange(len(content))] ^= 0x40
    path.write_bytes(content)


def damage_file(here: Path, source: Path, name: str, change: Callable[[Path], Any]) -> None:
    """A copy of a folder, or of a run's part of it, as HERE/in with one file changed."""
    if name.partition("/")[0] in RUN_FILES and (source / "run.yaml").exists():
        copy_run(source, here / "in")
    else:
        shutil.copytree(source, here / "in")
    change(here / "in" / name)


RUN_FILES = ("checkpoints", "config.yaml", "events.jsonl", "metrics.jsonl", "environment.json", "owner.json", "starts")


def copy_run(place: Path, target: Path) -> None:
    target.mkdir()
    for name in RUN_FILES:
        if (place / name).is_dir():
            shutil.copytree(place / name, target / name)
        else:
            shutil.copy(place / name, target / name)


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def chosen(pairs: list[tuple[str, str]], number: int) -> list[tuple[str, str]]:
    return random.Random(SEED).sample(pairs, min(number, len(pairs)))


def change_metadata(path: Path, change: Callable[[Any], Any]) -> None:
    """Write what a change makes of the records of `.metadata`."""
    found = pickle.loads(path.read_bytes())
    made = change(found)
    path.write_bytes(pickle.dumps(found if made is None else made))


def changes_of_metadata() -> dict[str, Callable[[Any], Any]]:
    """Fields of `.metadata` that are missing, of another type, or claim something that is not so."""

    def first(found: Any) -> Any:
        return next(entry for entry in found.state_dict_metadata.values() if hasattr(entry, "chunks"))

    changes: dict[str, Callable[[Any], Any]] = {}
    for field in ("state_dict_metadata", "planner_data", "storage_data", "storage_meta"):
        for value in (None, [], {}, 1, "x"):
            changes[f"{field}={value!r}"] = lambda found, field=field, value=value: setattr(found, field, value)  # type: ignore[misc]
    for field in ("properties", "size", "chunks"):
        for value in (None, [], "x", 1, (-1,), (2**62, 2**62)):
            changes[f"tensor {field}={value!r}"] = (  # type: ignore[assignment]
                lambda found, field=field, value=value: object.__setattr__(first(found), field, value)
            )
    for field in ("offsets", "sizes"):
        for value in (None, (), (-1, -1), (2**62,), "x", (0.5,)):
            changes[f"chunk {field}={value!r}"] = (  # type: ignore[assignment]
                lambda found, field=field, value=value: object.__setattr__(first(found).chunks[0], field, value)
            )
    for field in ("relative_path", "offset", "length"):
        for value in (None, -1, 2**62, "", "../../x", "/etc/passwd", "\0", []):
            changes[f"storage {field}={value!r}"] = (  # type: ignore[assignment]
                lambda found, field=field, value=value: setattr(next(iter(found.storage_data.values())), field, value)
            )
    for value in (None, [], {}, 1, b"x", {"x": [[]]}):
        changes[f"all of it {value!r}"] = lambda found, value=value: copy.copy(value) or [value]  # type: ignore[misc]
    return changes


def states(place: Path) -> Iterator[Case]:
    """Training states: torch Distributed Checkpoint and DeepSpeed's universal layout, with our record and without."""
    words = ("import", "HERE/in", "HERE/out")
    for name, change in changes_of_metadata().items():
        make = partial(
            damage_file, source=place / "dcp", name=".metadata", change=partial(change_metadata, change=change)
        )
        yield Case(f"dcp {name}", words, make, out="out")
    for folder, number in (("dcp", 40), ("universal", 80)):
        pairs = [(name, damage) for name in files_of(place / folder) for damage in DAMAGE]
        yield from damaged(place / folder, pairs, number, words)
        names = files_of(place / folder)
        for seed in range(20):
            name = names[seed % len(names)]
            make = partial(damage_file, source=place / folder, name=name, change=partial(flip, seed=seed))
            yield Case(f"{folder} {name} flip {seed}", words, make, out="out")


def damaged(folder: Path, pairs: list[tuple[str, str]], number: int, *commands: tuple[str, ...]) -> Iterator[Case]:
    """A random part of all damages of all files of a folder, under the commands in turn."""
    for index, (name, damage) in enumerate(chosen(pairs, number)):
        make = partial(damage_file, source=folder, name=name, change=DAMAGE[damage])
        words = commands[index % len(commands)]
        out = "out" if "HERE/out" in words and "megatron" not in words else None  # which has whole files next to others
        codes = (DONE, BAD_INPUT, RUN_FAILED) if words[0] in ("export", "merge", "tasks") else (DONE, BAD_INPUT)
        yield Case(f"{folder.name} {name} {damage} {words[0]}", words, make, out=out, codes=codes)


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def change_head(path: Path, change: Callable[[dict[str, Any]], Any], length: int | None = None) -> None:
    """Change the head of a safetensors file, or claim another length of it."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    head = json.loads(content[8 : 8 + size])
    change(head)
    made = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(made) if length is None else length) + made + content[8 + size :])


def false_heads() -> dict[str, Callable[[Path], Any]]:
    """Heads of safetensors that overflow, overlap, repeat or name what is not there."""

    def entry(head: dict[str, Any]) -> dict[str, Any]:
        return next(value for name, value in head.items() if name != "__metadata__")

    def set_field(head: dict[str, Any], field: str, value: Any) -> None:
        entry(head)[field] = value

    heads: dict[str, Callable[[Path], Any]] = {}
    for field, values in {
        "data_offsets": ([0, 2**62], [-1, 4], [8, 4], [0], [0, 4, 8], None, "x", [0.5, 4], [2**63, 2**64]),
        "shape": ([-1], [2**62, 4], [], None, "x", [[1]], [0], [1] * 1000),
        "dtype": ("F64", "I8", "F8_E4M3", "X", None, 1, "BOOL"),
    }.items():
        for value in values:
            change = partial(set_field, field=field, value=value)
            heads[f"{field}={value!r:.30}"] = partial(change_head, change=change)
    for length in (0, 1, 2**63, 2**64 - 1, 10**8):
        heads[f"length {length}"] = partial(change_head, change=lambda head: None, length=length)
    heads["no tensors"] = partial(change_head, change=dict.clear)
    heads["metadata"] = partial(change_head, change=lambda head: head.update(__metadata__=[1]))
    heads["another tensor"] = partial(change_head, change=lambda head: head.update(other=entry(head)))
    heads["a tensor less"] = partial(change_head, change=lambda head: head.pop(sorted(head)[-1]))
    return heads


def models(place: Path) -> Iterator[Case]:
    """Folders of transformers' format."""
    source, words = place / "exported", ("import", "HERE/in", "HERE/out")
    config = json.loads((source / "config.json").read_text())
    pairs = [(key, index) for key in sorted(config) for index in range(len(ODD))]
    for key, index in random.Random(SEED).sample(pairs, 60):
        change = partial(change_json, change=lambda found, key=key, index=index: found.update({key: ODD[index]}))  # type: ignore[misc]
        make = partial(damage_file, source=source, name="config.json", change=change)
        yield Case(f"config.json {key}={ODD[index]!r:.30}", words, make, out="out")
    for name, change in false_heads().items():
        make = partial(damage_file, source=source, name="model.safetensors", change=change)
        yield Case(f"model.safetensors {name}", words, make, out="out")
    for value in ODD:
        index = json.dumps({"metadata": {}, "weight_map": {"embedding.weight": value}})

        def make_index(here: Path, index: str = index) -> None:
            shutil.copytree(source, here / "in")
            (here / "in" / "model.safetensors").unlink()
            (here / "in" / "model.safetensors.index.json").write_text(index)

        yield Case(f"index {value!r:.30}", words, make_index, out="out")
    pairs_of_files = [(name, damage) for name in files_of(source) for damage in DAMAGE]
    yield from damaged(source, pairs_of_files, 60, words)


def runs_and_stores(place: Path) -> Iterator[Case]:
    """Run directories under the verbs that read them, stores under theirs."""
    of_run = (
        ("report", "HERE/in"),
        ("watch", "HERE/in", "--json"),
        ("inspect", "HERE/in"),
        ("merge", "HERE/in", "HERE/out", "--last", "1"),
        ("inspect", "HERE/in/checkpoints/step-00000001"),
        ("rollback", "HERE/in", "--to", "1"),
        ("export", "HERE/in", "HERE/out", "--no-verify"),
    )
    names = [name for name in files_of(place) if name.partition("/")[0] in RUN_FILES]
    yield from damaged(place, [(name, damage) for name in names for damage in DAMAGE], 105, *of_run)
    of_store = (
        ("inspect", "HERE/in"),
        ("inspect", "HERE/in", "--quick"),
        ("tasks", "HERE/in", "HERE/out"),
        ("export", "HERE/in", "HERE/out", "--format", "megatron"),
    )
    store = place / "store"
    yield from damaged(store, [(name, damage) for name in files_of(store) for damage in DAMAGE], 100, *of_store)


MARKUP = ("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\"><svg onload=alert(1)>", "'; alert(1); '", "</script><script>x", "$x$", "\\frac{", "\x1b]0;x\x07", "\u202eabc", "&lt;", "%s%n", "{{7*7}}")  # fmt: skip


def markup(place: Path) -> Iterator[Case]:
    """Markup in names, events and metrics, under the report of one run and of two."""
    for text in MARKUP:

        def make(here: Path, text: str = text) -> None:
            copy_run(place, here / "in")
            event = json.dumps({"time": 1.5, "event": text, "step": 0, text: text})
            metric = json.dumps({"step": 1, "loss": 1.0, "lr": 1.0, "tokens": 1, text: 1.0, f"loss/{text}": 2.0})
            (here / "in" / "events.jsonl").open("a").write(event + "\n")
            (here / "in" / "metrics.jsonl").open("a").write(metric + "\n")
            (here / "in" / "environment.json").write_text(json.dumps({text: text, "host": text}))
            shutil.copytree(here / "in", here / "two")

        yield Case(f"markup {text}", ("report", "HERE/in"), make)
        yield Case(f"markup {text} of two", ("report", "HERE/in", "HERE/two"), make)
