"""The documents behind a spike are named first, with their place and text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from amfm_replay.spike import find_worst

from amfm.data_pipeline.config import DataConfig, PrepareConfig, SourceConfig, TokenizerConfig
from amfm.data_pipeline.prepare.prepare import prepare
from amfm.data_pipeline.verify import sample_text
from amfm.launch.cli import run as run_cli
from amfm.pretrain.train import train
from tests.helpers.json_output import one_object
from tests.helpers.tiny_store import run_in_process, write_jsonl
from tests.pretrain.tiny_run import tiny_config

PLANTED = 3
STEPS = 30


def planted_store(folder: Path) -> DataConfig:
    """Text that can be learned, and a few documents of rare characters in any order."""
    path = write_jsonl(folder / "text.jsonl", 150, seed=1, mean_words=12)
    random = np.random.default_rng(5)
    noise = ["".join(random.choice(list("ZQXJ#@%&0123456789"), size=60)) for _ in range(PLANTED)]
    lines = path.read_text().splitlines()
    for place, text in zip((20, 70, 110), noise):
        lines.insert(place, json.dumps({"text": text}))
    path.write_text("\n".join(lines) + "\n")
    data = DataConfig(
        store=str(folder / "store"),
        sources=(SourceConfig(name="web", paths=(str(path),)),),
        tokenizer=TokenizerConfig(vocab_size=400, algorithm="bpe"),
        prepare=PrepareConfig(chunk_tokens=512),
        validation_fraction=0.1,
        num_workers=0,
    )
    prepare(data, runner=run_in_process)
    return data


def test_planted_documents_come_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = planted_store(tmp_path), tmp_path / "run"
    settings = {"train__checkpoint_every_steps": 10, "train__keep_last": 9, "model__pattern": "-", "model__moe": None}
    assert train(tiny_config(data, run, train__steps=STEPS, **settings)) == 0
    held = {}
    for sample in range(4 * 11, 4 * STEPS):
        shown = sample_text(data, sample, sequence_length=48, seed=0)
        for offset, text in enumerate(shown.documents):
            if sum(letter in "ZQXJ#@%&0123456789" for letter in text) > 30:
                held[sample] = (shown.part, shown.first_document + offset, text)
    sample, (part, document, text) = next(iter(held.items()))
    found = find_worst(run, sample // 4 + 1)
    assert found.weights_of_step in (10, 20) and len(found.rows) == 4
    assert found.rows[0][0] == sample and found.rows[0][1] == "web"
    assert sorted(row[2] for row in found.rows) == [row[2] for row in found.rows][::-1]
    worst = found.documents[0]
    assert (worst.sample, worst.part, worst.document, worst.text) == (sample, part, document, text)
    capsys.readouterr()
    assert run_cli(["inspect", str(run), "--spike", str(sample // 4 + 1), "--json"]) == 0
    assert one_object(capsys.readouterr().out)["documents"][0]["document"] == document
    assert run_cli(["inspect", str(run), "--spike", str(sample // 4 + 1)]) == 0
    assert f"document {document}, token" in capsys.readouterr().out


def test_a_step_that_the_run_does_not_have_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert run_cli(["inspect", str(tmp_path), "--spike", "3"]) == 2
    assert "needs a run directory" in capsys.readouterr().err
    assert (
        train(tiny_config(planted_store(tmp_path), run, model__pattern="E-", train__steps=2, schedule__warmup_steps=0))
        == 0
    )
    assert run_cli(["inspect", str(run), "--spike", "3"]) == 2
    assert f"--spike 3: {run} has the steps 1 to 2" in " ".join(capsys.readouterr().err.split())
