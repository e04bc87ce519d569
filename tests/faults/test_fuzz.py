"""Mutated files give one message: no traceback, no more than 5 s of work, no allocation over 1 GiB."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.faults.disk import ROOT
from tests.faults.inputs.sound_files import write_sound_files
from tests.helpers.processes.zygote import run_program

CHEAP = (
    *("yaml", "store_manifest", "journal", "metrics", "heartbeat", "checkpoint_manifest", "signed_checkpoint_manifest"),
    *("safetensors", "tokenizer_model", "tokenizer_json", "weights_description"),
)
SOURCES = (
    *("a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.idx", "a.arrow", "b.arrow"),
    *("a.parquet", "b.parquet", "c.parquet", "a.parquet.gz"),
)
TOKENS = tuple(
    f"tokens/{name}"
    for name in ("a.mds", "b.mds.zstd", "chunk-0-0.bin", "index.json", "part-0.csv.gz", "00000_tokens.ds.index")
)
CHAT = ("chat/a.jsonl", "chat/chat.jinja")
EXCHANGED = ("dcp_metadata", "dcp_tensors", "step_of_torch", "common_state", "tiktoken")
WATCHED = ("pattern", "events", "followed", "found_duplicates")
UNIVERSAL = ("universal_latest", "universal_weights", "universal_record")
DEAR = ("shard", "zarr_metadata", "imported_config", "imported_weights", "imported_tokenizer")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sound_files(tmp_path_factory.mktemp("fuzz"))


def fuzz(place: Path, count: int, readers: tuple[str, ...]) -> list[dict[str, object]]:
    words = ["-W", "ignore", "-m", "tests.faults.fuzz", place, str(count), *readers]
    done = run_program([sys.executable, *words], cwd=ROOT)
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, (done.returncode, reports[-1:], done.stderr[-2000:])
    return reports


def check(reports: list[dict[str, object]], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        for report in reports:
            print(f"\n{report['reader']}: {report['cases']} mutations, {report['refused']} rejected", end="")
    assert [report for report in reports if report["broken"]] == []


def test_no_reader_breaks_on_a_few_mutations(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(fuzz(place, 20, (*CHEAP, *SOURCES, *TOKENS, *CHAT, *EXCHANGED, *WATCHED)), capsys)


@pytest.mark.slow
def test_no_reader_breaks_on_many_mutations(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(fuzz(place, 1000, (*CHEAP, *SOURCES, *TOKENS, *CHAT, *EXCHANGED, *WATCHED)), capsys)
    check(fuzz(place, 100, (*DEAR, *UNIVERSAL)), capsys)
