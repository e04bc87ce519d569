"""Every reader of files under mutated files: one message, no traceback, no hang, no gigabyte.

Called as `python -m tests.faults.fuzz PLACE COUNT READER...`; prints a JSON line a reader with its number of cases and what
broke. In a separate process, because native libraries may end it, and because its memory is limited to a gigabyte more
than it has when it begins.
"""

from __future__ import annotations

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

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amfm.data_pipeline.durable.foreign_files import read_object
from amfm.data_pipeline.prepare.journal import Journal
from amfm.data_pipeline.store.store import TokenStore
from amfm.data_pipeline.tokenizer.tokenizer import read_tokenizer_file
from amfm.data_pipeline.verify import verify_store
from amfm.pretrain.checkpoint.files import encode_manifest, read_manifest, verify_checkpoint
from amfm.pretrain.config.file import load_config
from amfm.pretrain.inference.weights import read_weights
from amfm.pretrain.monitor.beats import read_beats
from amfm.pretrain.monitor.metrics import keep_until
from amfm.pretrain.report.data import read_json_lines
from amfm.pretrain.tensor_files import TensorFile

# Of the processor's time: other programs may hold up a reader that is quick. One that waits for something takes longer yet.
MAX_SECONDS = 5.0
MAX_WAITING_SECONDS = 60.0
MAX_BYTES = 1 << 30
ODD = (None, [], {}, "", "../../x", "/etc/passwd", "\0", -1, 0, 2**63, 1e308, True, [[]], {"x": None}, "x" * 5000)
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
        return self.place / "run.yaml", lambda: load_config(self.place / "run.yaml")

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
    report: dict[str, Any] = {"reader": name, "cases": 0, "refused": 0, "broken": []}
    read()
    path.write_bytes(sound)

    def judge(content: bytes) -> None:
        path.write_bytes(content)
        began, worked = time.monotonic(), time.process_time()
        report["cases"] += 1
        try:
            read()
        except (ValueError, RuntimeError, OSError) as error:
            report["refused"] += 1
            if isinstance(error, RecursionError | NotImplementedError):
                report["broken"].append(f"{type(error).__name__}: {content[:300]!r}")
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what is looked for
            report["broken"].append(f"{type(error).__name__}: {error}: {content[:300]!r}")
        waited, worked = time.monotonic() - began, time.process_time() - worked
        if worked > MAX_SECONDS or waited > MAX_WAITING_SECONDS:
            report["broken"].append(f"took {waited:.1f} s, {worked:.1f} s of them computing: {content[:300]!r}")

    @settings(
        max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.randoms(use_true_random=False, note_method_calls=False))
    def mutated(draw: random.Random) -> None:
        judge(mutate(sound, draw))

    for content in NESTED:
        judge(content)
    mutated()
    path.write_bytes(sound)
    report["broken"] = sorted(set(report["broken"]), key=len)[:5]
    return report


if __name__ == "__main__":
    readers = Readers(Path(sys.argv[1]))
    chosen = {name: getattr(readers, name)() for name in sys.argv[3:]}
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    for name, (path, read) in chosen.items():
        print(json.dumps(fuzz(name, path, read, int(sys.argv[2]))), flush=True)
    os._exit(0)
