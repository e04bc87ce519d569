"""Mutated files give one message: no traceback, no more than 5 s of work, no allocation over 1 GiB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.export.export import export_checkpoint
from amfm.pretrain.train import train
from tests.faults.disk import ROOT
from tests.pretrain.export.exported_models import weights_folder
from tests.pretrain.tiny_run import tiny_config, tiny_data

CHEAP = (
    *("yaml", "store_manifest", "journal", "metrics", "heartbeat", "checkpoint_manifest", "signed_checkpoint_manifest"),
    *("safetensors", "tokenizer_model", "tokenizer_json", "weights_description"),
)
DEAR = ("shard", "zarr_metadata", "imported_config", "imported_weights", "imported_tokenizer")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sound file of every kind."""
    place = tmp_path_factory.mktemp("fuzz")
    data = tiny_data(place)
    config = tiny_config(data, place, train__steps=4, train__stop_after_steps=1)
    assert train(config) == 0
    (place / "run.yaml").write_text(resolved_yaml(config))
    (place / "beats").mkdir()
    (place / "beats" / "rank-0.json").write_text('{"rank": 0, "host": "a", "step": 3, "phase": "data", "seen": 1.5}')
    vocabulary = {"</s>": 0, "a": 1, "b": 2, "ab": 3}
    tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("a", "b")])).save(str(place / "tokenizer.json"))
    export_checkpoint(weights_folder(data, place / "weights", "nemotron_h"), place / "exported", verify=False)
    return place


def fuzz(place: Path, count: int, readers: tuple[str, ...]) -> list[dict[str, object]]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.faults.fuzz", str(place), str(count), *readers],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, (done.returncode, reports[-1:], done.stderr[-2000:])
    return reports


def check(reports: list[dict[str, object]], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        for report in reports:
            print(f"\n{report['reader']}: {report['cases']} mutations, {report['refused']} refused", end="")
    assert [report for report in reports if report["broken"]] == []


def test_no_reader_breaks_on_a_few_mutations(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(fuzz(place, 15, CHEAP), capsys)


@pytest.mark.slow
def test_no_reader_breaks_on_many_mutations(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(fuzz(place, 1000, CHEAP), capsys)
    check(fuzz(place, 100, DEAR), capsys)
