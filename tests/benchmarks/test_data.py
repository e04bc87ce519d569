"""`python -m benchmarks.data` at a small size: every number is there and they agree with each other; speeds are not judged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from amfm.data_pipeline.prepare.prepare import prepare
from amfm.data_pipeline.store.store import TokenStore
from benchmarks.data import bench as bench_data
from benchmarks.data.__main__ import print_data_tables
from benchmarks.data.files import BenchData, export_for_megatron, recode_store, windows
from benchmarks.data.readers import megatron_readers, memmap_reader, our_reader, zarr_reader
from tests.helpers.tiny_store import run_in_process, write_jsonl

ROW = {"reader", "preset", "microseconds_per_sample", "bytes_per_token", "wall_microseconds_per_sample"}
PREPARATION = {
    "tokens_per_second",
    "tokenizer_tokens_per_second",
    "share_of_tokenizer",
    "share_of_fastest",
    "ray_cpu_fraction",
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> BenchData:
    work = tmp_path_factory.mktemp("bench")
    text = write_jsonl(work / "text.jsonl", 400, seed=3)
    return BenchData(
        work / "work",
        (str(text),),
        sequence_length=64,
        batch=4,
        samples=32,
        rounds=2,
        cold_reads=3,
        vocab_size=400,
        part_bytes=30_000,
        huge_tokens=1_000_000,
    )


@pytest.fixture(scope="module")
def store(settings: BenchData) -> TokenStore:
    """The store `fast` without Ray, in its own place."""
    prepare(settings.data_config("alone"), runner=run_in_process)
    return TokenStore.open(settings.work / "alone")


@pytest.fixture(scope="module")
def result(settings: BenchData) -> dict[str, Any]:
    """All of it: about 20 seconds, most of them imports of the processes that it starts."""
    return bench_data.bench_data(settings, lambda _: None)


@pytest.mark.slow
def test_every_reader_gives_a_time_and_bytes(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert {(row["reader"], row["preset"]) for row in result["rows"]} >= {
        ("amfm", "fast"), ("amfm", "balanced"), ("amfm", "small"), ("megatron_gpt_dataset", ""), ("numpy_memmap", ""),
        ("zarr_python", "fast"), ("zarr_python", "small"),
    }  # fmt: skip
    for row in result["rows"]:
        assert set(row) >= ROW
        assert 0 < row["microseconds_min"] <= row["microseconds_per_sample"] and row["bytes_per_token"] > 0
    (yardstick,) = [row for row in result["rows"] if row["reader"] == "megatron_gpt_dataset"]
    assert yardstick["times_as_fast_as_gpt_dataset"] == 1
    assert json.loads(json.dumps(result)) == result
    print_data_tables(result)
    assert "megatron_gpt_dataset" in capsys.readouterr().out


@pytest.mark.slow
def test_preparation_start_and_cold_reads_are_measured(result: dict[str, Any], settings: BenchData) -> None:
    made = result["preparation"]
    assert set(made) >= PREPARATION
    assert made["tokens"] == TokenStore.open(settings.work / "fast").num_tokens("text", "train")
    assert made["tokens_per_second"] > 0 and made["tokenizer_tokens_per_second"] > 0
    assert result["first_batch"]["seconds"] > 0 and result["first_batch"]["memory_bytes"] >= 0
    huge = TokenStore.open(settings.work / "huge")
    assert huge.num_tokens("text", "train") >= settings.huge_tokens
    assert len(huge.parts("text", "train")) == result["first_batch"]["parts"]
    assert {row["reader"] for row in result["cold"]} == {"amfm fast", "amfm balanced", "amfm small", "numpy_memmap"}
    assert all(row["microseconds"] > 0 for row in result["cold"])


def test_readers_read_the_text_that_was_prepared(settings: BenchData, store: TokenStore) -> None:
    """Ours and zarr-python give the same rows in the same order; memmap and GPTDataset the same tokens in theirs."""
    (batch,) = our_reader(settings, store).read(8)
    samples = list(zarr_reader(settings, store).read(8))
    assert torch.equal(batch.tokens_BT, torch.stack([sample["tokens"] for sample in samples]))
    prefix = settings.work / "again"
    num_bytes = export_for_megatron(store, prefix)
    flat = np.concatenate([store.read_tokens(p, 0, p.num_tokens) for p in store.parts("text", "train")]).tolist()
    text = ",".join(map(str, flat))
    for sample in memmap_reader(settings, store, prefix.with_suffix(".bin")).read(0):
        row = [*sample["tokens"].tolist(), int(sample["labels"][-1])]
        assert ",".join(map(str, row)) in text
    plain, _, apart = megatron_readers(settings, store, prefix, num_bytes)
    for sample, other in zip(plain.read(0), apart.read(0)):
        assert torch.equal(sample["tokens"], other["tokens"]) and torch.equal(
            sample["labels"][:-1], sample["tokens"][1:]
        )
        assert set(sample["tokens"].tolist()) <= set(flat)


def test_megatron_reads_the_text_of_this_run_and_nothing_it_kept_of_another(
    settings: BenchData, store: TokenStore, tmp_path: Path
) -> None:
    """GPTDataset knows its indices by the names of the files and the number of samples, not by their documents."""
    shutil.copy(store.tokenizer_path, tmp_path / "tokenizer.model")
    other = replace(settings, work=tmp_path, part_bytes=10_000)
    prepare(other.data_config("other"), runner=run_in_process)
    prefix, num_tokens = tmp_path / "megatron", store.num_tokens("text", "train")
    for text in (store, TokenStore.open(tmp_path / "other")):
        assert text.num_tokens("text", "train") == num_tokens, "the same documents in another order"
        plain, *_ = megatron_readers(settings, text, prefix, export_for_megatron(text, prefix))
        samples = (num_tokens - 1) // settings.sequence_length // settings.batch * settings.batch
        rows = [sample["tokens"] for first in range(0, samples, settings.batch) for sample in plain.read(first)]
        flat = np.concatenate([text.read_tokens(p, 0, p.num_tokens) for p in text.parts("text", "train")])
        read, held = (np.bincount(tokens, minlength=text.vocab_size) for tokens in (np.concatenate(rows), flat))
        assert len(rows) > 100 and (read <= held).all(), "no token is read more often than an epoch holds it"


def test_another_preset_holds_the_same_tokens(store: TokenStore, tmp_path: Path) -> None:
    small = recode_store(store, tmp_path / "small", "small")
    pairs = list(zip(windows(store, 64), windows(small, 64)))
    assert pairs and all(np.array_equal(ours, theirs) for ours, theirs in pairs)
