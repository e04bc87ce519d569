"""`amfm sample-data`, `prepare` and `inspect --sample`: what they reject and what they print."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from amfm.data_pipeline.loader.loader import PretrainLoader
from amfm.data_pipeline.prepare.report import Progress
from amfm.data_pipeline.tokenizer.tokenizer import load_tokenizer
from amfm.launch.cli import run
from amfm.launch.commands.data import describe_progress, said_to_be_resumable
from amfm.pretrain.config.file import load_config
from tests.helpers.json_output import one_object
from tests.helpers.tiny_store import make_text, make_tiny_store


def test_corpus_names_the_known_ones(capsys):
    assert run(["sample-data", "encyclopedia"]) == 2
    assert "corpus 'encyclopedia' must be one of shakespeare" in capsys.readouterr().err


def test_prepare_checks_the_whole_configuration_first(base, capsys):
    assert run(["prepare", str(base), "train.stop_after_steps=200"]) == 2
    assert "train.stop_after_steps=200: is beyond train.steps=100" in capsys.readouterr().err


def test_prepare_names_missing_text(base, capsys, tmp_path):
    assert (
        run(["prepare", str(base), f"data.store={tmp_path}/store", f"data.sources.0.paths=[{tmp_path}/none.txt]"]) == 2
    )
    assert "none.txt" in capsys.readouterr().err


def test_rows_that_a_store_cannot_fill_are_refused_when_it_is_prepared(tmp_path, base, capsys):
    """As training would, of text held out too where the run validates."""
    random = np.random.default_rng(0)
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(make_text(random, 300))
    settings = [
        f"data.store={tmp_path}/store",
        f"data.sources=[{{name: texts, paths: ['{tmp_path}/*.txt']}}]",
        *("data.tokenizer={vocab_size: 320}", "data.validation_fraction=0.1", "train.validate_every_steps=5"),
    ]
    assert run(["prepare", str(base), *settings, "train.sequence_length=64"]) == 0
    assert run(["prepare", str(base), *settings, "train.sequence_length=2048"]) == 2
    assert "below the" in (said := capsys.readouterr().err) and "largest validation part" in said
    assert "raise data.validation_fraction and run `amfm prepare CONFIG` again" in said
    assert run(["prepare", str(base), *settings, "train.sequence_length=65536"]) == 2
    assert "largest train part" in capsys.readouterr().err


def test_progress_of_a_preparation_names_rates_and_the_time_to_go():
    now = Progress("tokenize", 3, 8, 1500, 6_000_000, 2_000_000, rejects=4, seconds=2.0, eta_seconds=3.4)
    remark = "2,000,000 tokens, 750 documents/s, 3.0 MB/s, 1,000,000 tokens/s"
    assert describe_progress(now) == (3, 8, remark, 3.4)
    assert describe_progress(replace(now, stage="duplicates"))[2] == "looking for duplicates, 3.0 MB/s"
    assert describe_progress(replace(now, stage="tokenizer"))[2] == "training the tokenizer"


def test_inspect_decodes_what_a_global_sample_trains_on(tmp_path, base, capsys):
    data = make_tiny_store(tmp_path / "data")
    settings = load_config(base).model_dump(mode="json") | {"data": data.model_dump(mode="json")}
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(settings))
    loader = PretrainLoader(
        data, sequence_length=settings["train"]["sequence_length"], micro_batch_size=1, seed=settings["train"]["seed"]
    )
    loader.seek(9)
    expected = loader.take(1)[0].tokens_BT[0].tolist()
    for arguments in ([str(tmp_path)], [data.store, "--config", str(config)]):
        assert run(["inspect", *arguments, "--sample", "9", "--json"]) == 0
        assert one_object(capsys.readouterr().out)["tokens"] == expected
    assert run(["inspect", str(tmp_path), "--sample", "9"]) == 0
    shown = capsys.readouterr().out
    text = load_tokenizer(data.store).decode(expected[:20])
    assert "source0, epoch 0" in shown and "--- document" in shown and text.split()[1] in shown
    assert run(["inspect", data.store, "--sample", "9"]) == 2
    assert "needs a run directory, or a store and --config CONFIG" in capsys.readouterr().err
    assert run(["inspect", data.store, "--config", str(config)]) == 2
    assert "is for --sample G" in capsys.readouterr().err


@pytest.mark.slow
def test_installed_python_sources_are_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sample-data", "python-sources", str(tmp_path), "--megabytes", "1", "--json"]
    assert run(command) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["files"] == 1 and 1_000_000 <= first["bytes"] < 3_000_000
    (file,) = tmp_path.glob("*.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({record["text"] for record in records}) == len(records) > 10
    before = file.stat().st_mtime_ns
    assert run(command) == 0 and file.stat().st_mtime_ns == before
    assert run(["sample-data", "python-sources", str(tmp_path / "more"), "--megabytes", "1000000"]) == 2
    assert "--megabytes 1000000 must be at most" in capsys.readouterr().err
    assert run(["sample-data", "shakespeare", str(tmp_path / "plays"), "--megabytes", "3"]) == 2
    assert "--megabytes=3 is for python-sources" in capsys.readouterr().err


def test_sigterm_ends_a_preparation_with_words_and_code_3():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="prepare was stopped by SIGTERM; the same command does what is missing"):
        with said_to_be_resumable():
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
