"""Every reader of files under mutated files: one message, no traceback, no hang, no gigabyte.

Called as `python -m tests.faults.fuzz PLACE COUNT READER...`; prints a JSON line a reader with its number of cases and what
broke. In a separate process, because native libraries may end it, and because its memory is limited to a gigabyte more
than it has when it begins.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
from amfm_foreign_states.dcp_folder import DcpFolder
from amfm_foreign_states.torch_file import find_steps, read_common, read_integer
from amfm_foreign_states.universal import UniversalFolder
from yaml import safe_dump

from amfm.data_pipeline.config import FilterConfig, SourceConfig, TokenizerConfig
from amfm.data_pipeline.durable.json_files import read_object
from amfm.data_pipeline.prepare.dialogues import dialogues_of
from amfm.data_pipeline.prepare.documents import SegmentReader
from amfm.data_pipeline.prepare.duplicates import mark_duplicates
from amfm.data_pipeline.prepare.finished_units import Journal
from amfm.data_pipeline.prepare.plan import Unit, UnitSettings
from amfm.data_pipeline.prepare.reading import make_filter
from amfm.data_pipeline.prepare.rejects import place_of
from amfm.data_pipeline.prepare.segments import check_column, cut_segments
from amfm.data_pipeline.prepare.sources import list_files
from amfm.data_pipeline.store.manifest import Layout
from amfm.data_pipeline.store.store import TokenStore
from amfm.data_pipeline.tokenizer.tiktoken import convert_tiktoken
from amfm.data_pipeline.tokenizer.tokenizer import read_tokenizer_file
from amfm.data_pipeline.verify import verify_store
from amfm.model.config.pattern import parse_pattern
from amfm.pretrain.checkpoint.files import verify_checkpoint
from amfm.pretrain.checkpoint.manifest_file import encode_manifest, read_manifest
from amfm.pretrain.config.file import load_config
from amfm.pretrain.failures import exit_code, is_bug
from amfm.pretrain.inference.weights import read_weights
from amfm.pretrain.launcher_protocol import BAD_INPUT
from amfm.pretrain.monitor.beats import read_beats
from amfm.pretrain.monitor.follow import FollowedRun
from amfm.pretrain.monitor.metrics import keep_until
from amfm.pretrain.report.data import read_json_lines
from amfm.pretrain.report.page import render_events
from amfm.pretrain.tensor_files import TensorFile

# Of the processor's time: other programs may hold up a reader that is quick. One that waits for something takes longer yet.
MAX_SECONDS = 5.0
MAX_WAITING_SECONDS = 60.0
MAX_BYTES = 1 << 30
ODD = (None, [], {}, "", "../../x", "/etc/passwd", "\0", -1, 0, 2**63, 1e308, True, [[]], {"x": None}, "x" * 5000)
# What amfm wrote and finds damaged is the machine's state, and ends with 3; another's file is bad input.
OWN = (
    "store_manifest",
    "shard",
    "zarr_metadata",
    "checkpoint_manifest",
    "signed_checkpoint_manifest",
    "weights_description",
)
UNIT_SETTINGS = UnitSettings("text", FilterConfig(), 0.0, 0, 1000, Layout.for_vocabulary(400, 512, "fast"), "x", 400, 2)
# Deeper than any recursion limit that Python has or had, cut and whole; random mutations rarely put it where a value begins.
NESTED = (b'{"x": ' + b"[" * 200_000, b'{"x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n")


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    """Flip, cut, repeat, replace or insert."""
    out = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(out) + 1)
        kind = draw.randrange(5)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del out[at : at + draw.choice((1, 7, 100, len(out)))]
        elif kind == 2:
            out[at:at] = out[max(0, at - 50) : at] * draw.choice((1, 20))
        elif kind == 3:
            out[at : at + 8] = draw.choice((b"\xff" * 8, b"\0" * 8, (2**62).to_bytes(8, "little")))
        else:
            out[at:at] = draw.choice((b"{", b"[", b"null", b"\n", b"\xfe", b"&a [*a]", b"1e999", b"[" * 5000))
    return bytes(out)


def mutate_tree(value: Any, draw: random.Random) -> Any:
    """Replace or remove one value somewhere in a JSON tree."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.15:
        return draw.choice(ODD)
    if isinstance(value, dict):
        key = draw.choice(sorted(value))
        if draw.random() < 0.25:
            return {name: item for name, item in value.items() if name != key}
        return {**value, key: mutate_tree(value[key], draw)}
    index = draw.randrange(len(value))
    return [*value[:index], mutate_tree(value[index], draw), *value[index + 1 :]]


def mutate(content: bytes, draw: random.Random) -> bytes:
    """A tree's mutation where the content is JSON, bytes otherwise or sometimes."""
    if draw.random() < 0.5:
        try:
            return json.dumps(mutate_tree(json.loads(content), draw)).encode()
        except ValueError:
            pass
    return mutate_bytes(content, draw)


class Readers:
    """By name: the file that is mutated, and what reads it."""

    def __init__(self, place: Path) -> None:
        self.place, self.store = place, place / "store"
        self.checkpoint = next((place / "checkpoints").glob("step-*"))

    def yaml(self) -> tuple[Path, Callable[[], Any]]:
        """What a user writes; a run's own file, with each default, is parsed five times as long."""
        path = self.place / "short.yaml"
        config = load_config(self.place / "run.yaml").model_dump(mode="json", exclude_defaults=True)
        path.write_text(safe_dump(config))
        return path, lambda: load_config(path)

    def find(self, name: str) -> tuple[Path, Callable[[], Any]]:
        """A reader by its name; those of sources have the name of their file, others of several files are KIND/FILE."""
        kind, _, file = name.partition("/")
        if file:
            return {"tokens": self.tokens, "chat": self.chat}[kind](file)
        return self.source(name) if "." in name else getattr(self, name)()

    def store_manifest(self) -> tuple[Path, Callable[[], Any]]:
        return self.store / "manifest.json", lambda: TokenStore.open(self.store).close()

    def shard(self) -> tuple[Path, Callable[[], Any]]:
        return next(self.store.glob("parts/*/train*/tokens/c/0")), lambda: verify_store(self.store)

    def zarr_metadata(self) -> tuple[Path, Callable[[], Any]]:
        return next(self.store.glob("parts/*/train*/tokens/zarr.json")), lambda: verify_store(self.store)

    def journal(self) -> tuple[Path, Callable[[], Any]]:
        return self.store / "journal.jsonl", lambda: Journal(self.store)

    def tokenizer_model(self) -> tuple[Path, Callable[[], Any]]:
        path = self.store / "tokenizer.model"
        return path, lambda: read_tokenizer_file(path).encode("some text\nof two lines")

    def tokenizer_json(self) -> tuple[Path, Callable[[], Any]]:
        return self.place / "tokenizer.json", lambda: read_tokenizer_file(self.place / "tokenizer.json", "</s>")

    def metrics(self) -> tuple[Path, Callable[[], Any]]:
        path = self.place / "metrics.jsonl"
        return path, lambda: (read_json_lines(path), keep_until(path, 3))

    def heartbeat(self) -> tuple[Path, Callable[[], Any]]:
        return self.place / "beats" / "rank-0.json", lambda: read_beats(self.place / "beats")

    def checkpoint_manifest(self) -> tuple[Path, Callable[[], Any]]:
        return self.checkpoint / "manifest.json", lambda: verify_checkpoint(self.checkpoint)

    def signed_checkpoint_manifest(self) -> tuple[Path, Callable[[], Any]]:
        """The mutation gets a digest that is right."""
        path = self.checkpoint / "manifest.json"

        def read() -> None:
            try:
                body = read_object(path)
            except ValueError:  # no object to sign
                return
            body = {key: value for key, value in body.items() if key not in ("format", "format_version", "sha256")}
            path.write_text(encode_manifest(body))
            read_manifest(self.checkpoint)

        return path, read

    def safetensors(self) -> tuple[Path, Callable[[], Any]]:
        path = self.checkpoint / "rank-00000.safetensors"
        return path, lambda: dict(TensorFile(path).on_demand())

    def weights_description(self) -> tuple[Path, Callable[[], Any]]:
        return self.place / "weights" / "weights.json", lambda: read_weights(self.place / "weights")

    def source(self, name: str) -> tuple[Path, Callable[[], Any]]:
        """A file of text or tokens, as an actor reads it: all its segments, and what is left of damage in words."""
        path = self.place / "sources" / name

        def read() -> None:
            for file in list_files(SourceConfig(name="a", paths=(str(path),))):
                check_column([file], "text")
                for segment in cut_segments(file, 1000):
                    for item in SegmentReader(segment, "text", make_filter(FilterConfig(min_characters=3), "a")):
                        place_of(item.position, [segment])

        return path, read

    def tokens(self, name: str) -> tuple[Path, Callable[[], Any]]:
        """A file of token ids that another library wrote, or the index next to one, as an actor reads it."""
        path, read = self.place / "tokens" / name, {"a.mds": "free", "b.mds.zstd": "typed"}
        data = {
            "index.json": "chunk-0-0.bin",
            "part-0.csv.gz": "part-0.npy",
            "00000_tokens.ds.index": "00000_tokens.ds",
        }
        source = SourceConfig(
            name="a", paths=(str(path.with_name(data.get(name, name))),), text_column=read.get(name, "text")
        )

        def read_all() -> None:
            for file in list_files(source):
                for segment in cut_segments(file, 1000):
                    for item in SegmentReader(segment, source.text_column, None, 2):
                        place_of(item.position, [segment])

        return path, read_all

    def chat(self, name: str) -> tuple[Path, Callable[[], Any]]:
        """Conversations, or the template that writes them."""
        path = self.place / "chat" / name
        rows, template = path.with_name("a.jsonl"), path.with_name("chat.jinja")

        def read() -> None:
            source = SourceConfig(name="a", paths=(str(rows),), messages_column="messages")
            dialogues = dialogues_of(source, TokenizerConfig(chat_template=str(template)), None)
            for file in list_files(source):
                for segment in cut_segments(file, 1000):
                    for item in SegmentReader(segment, "text", None, dialogues=dialogues):
                        place_of(item.position, [segment])

        return path, read

    def found_duplicates(self) -> tuple[Path, Callable[[], Any]]:
        unit = Unit("a", 0, (), UNIT_SETTINGS)
        path = self.store / "duplicates" / "a" / "found.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "000000.skips.npy").touch()
        key = hashlib.blake2b(unit.key().encode(), digest_size=16).hexdigest()
        path.write_text(json.dumps([key, {unit.name: "0" * 32}]))
        return path, lambda: mark_duplicates(self.store, [unit])

    def pattern(self) -> tuple[Path, Callable[[], Any]]:
        """A pattern string, in a file of its own."""
        path = self.place / "pattern"
        path.write_text("(ME)*3|(M*E)x2({retnet}&W&*)/*E/*E")
        return path, lambda: parse_pattern(path.read_bytes().decode(errors="replace"))

    def events(self) -> tuple[Path, Callable[[], Any]]:
        path = self.place / "events.jsonl"
        path.write_text('{"time": 1.5, "event": "start", "step": 0, "ranks": 2}\n' * 3)
        return path, lambda: render_events(read_json_lines(path)[0])

    def followed(self) -> tuple[Path, Callable[[], Any]]:
        path = self.place / "metrics.jsonl"
        return path, lambda: FollowedRun(self.place).poll()

    def dcp_metadata(self) -> tuple[Path, Callable[[], Any]]:
        return self.place / "dcp" / ".metadata", lambda: self.read_dcp(self.place / "dcp")

    def dcp_tensors(self) -> tuple[Path, Callable[[], Any]]:
        return next((self.place / "dcp").glob("*.distcp")), lambda: self.read_dcp(self.place / "dcp")

    @staticmethod
    def read_dcp(path: Path) -> None:
        folder = DcpFolder(path)
        for name in [name for name in folder.tensors if name.startswith("model.")]:
            folder.source(name).read(0, 1)
        for name in sorted(folder.values)[:3]:
            folder.value(name)

    def universal(self, name: str) -> tuple[Path, Callable[[], Any]]:
        """A file of the universal layout."""
        return self.place / "universal" / name, lambda: UniversalFolder(self.place / "universal").read()

    def universal_latest(self) -> tuple[Path, Callable[[], Any]]:
        return self.universal("latest_universal")

    def universal_weights(self) -> tuple[Path, Callable[[], Any]]:
        return self.universal("global_step1/zero/embedding.weight/fp32.pt")

    def universal_record(self) -> tuple[Path, Callable[[], Any]]:
        return self.universal("global_step1/amfm/record.json")

    def step_of_torch(self) -> tuple[Path, Callable[[], Any]]:
        path = self.place / "universal/global_step1/zero/embedding.weight/step.pt"
        return path, lambda: read_integer(path)

    def common_state(self) -> tuple[Path, Callable[[], Any]]:
        path = self.place / "universal/global_step1/mp_rank_00_model_states.pt"
        return path, lambda: list(find_steps(read_common(path)))

    def tiktoken(self) -> tuple[Path, Callable[[], Any]]:
        path = self.place / "bytes.tiktoken"
        path.write_bytes(b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)))
        return path, lambda: convert_tiktoken(path, pattern=".", special_tokens={"<end>": 300})

    def imported_config(self) -> tuple[Path, Callable[[], Any]]:
        return self.imported("config.json")

    def imported_weights(self) -> tuple[Path, Callable[[], Any]]:
        return self.imported("model.safetensors")

    def imported_tokenizer(self) -> tuple[Path, Callable[[], Any]]:
        return self.imported("tokenizer_config.json")

    def imported(self, file: str) -> tuple[Path, Callable[[], Any]]:
        """A file of a transformers checkpoint."""
        from amfm.pretrain.export.import_huggingface import import_huggingface

        def read() -> None:
            shutil.rmtree(self.place / "imported", ignore_errors=True)
            import_huggingface(self.place / "exported", self.place / "imported")

        return self.place / "exported" / file, read


def fuzz(name: str, path: Path, read: Callable[[], Any], count: int) -> dict[str, Any]:
    """Read nested brackets and this many mutations of a file; the file is put back at the end."""
    sound = path.read_bytes()
    report: dict[str, Any] = {"reader": name, "cases": 0, "refused": 0, "tracebacks": 0, "wrong_codes": 0, "broken": []}
    read()
    path.write_bytes(sound)

    def judge(content: bytes) -> None:
        path.write_bytes(content)
        began, worked = time.monotonic(), time.process_time()
        report["cases"] += 1
        try:
            read()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what is looked for
            said = f"{type(error).__name__}: {str(error)[:300]}: {content[:300]!r}"
            if not isinstance(error, ValueError | RuntimeError | OSError | MemoryError) or is_bug(error):
                report["tracebacks"] += 1
                report["broken"].append(said)
            elif (code := exit_code(error)) != BAD_INPUT and name not in OWN:
                report["wrong_codes"] += 1
                report["broken"].append(f"code {code}: {said}")
            else:
                report["refused"] += 1
        waited, worked = time.monotonic() - began, time.process_time() - worked
        if worked > MAX_SECONDS or waited > MAX_WAITING_SECONDS:
            report["broken"].append(f"took {waited:.1f} s, {worked:.1f} s of them computing: {content[:300]!r}")

    for content in NESTED:
        judge(content)
    for number in range(count):
        judge(mutate(sound, random.Random(f"{name} {number}")))
    path.write_bytes(sound)
    report["broken"] = sorted(set(report["broken"]), key=len)[:5]
    return report


if __name__ == "__main__":
    # Arrow's own pool claims a gigabyte of addresses at its first use, which is all that a reader may have here.
    pyarrow.array([1])
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    readers = Readers(Path(sys.argv[1]))
    chosen = {name: readers.find(name) for name in sys.argv[3:]}
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    for name, (path, read) in chosen.items():
        print(json.dumps(fuzz(name, path, read, int(sys.argv[2]))), flush=True)
    os._exit(0)
