"""Synthetic tasks on the command line: a run evaluated, shown row by row, and what does not go with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from amfm.launch.cli import run
from tests.examples.synthetic.test_runs import synthetic_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from amfm.pretrain.train import train

    folder = tmp_path_factory.mktemp("task")
    assert train(synthetic_config(folder, train__steps=2, schedule__warmup_steps=1)) == 0
    return folder


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert run([*arguments, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert isinstance(value, dict)
    return value


def test_evaluate_asks_the_task_of_the_run_and_others(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = printed(capsys, "evaluate", str(trained), "--synthetic", "selective_copying", "--rows", "9")
    assert own["settings"] == {"num_copied": 2, "num_symbols": 4} and own["sequence_length"] == 10
    assert (own["rows"], own["answers"], own["chance"]) == (9, 18, 0.25)
    assert 0 <= own["row_accuracy"] <= own["accuracy"] <= 1 and own["loss"] > 0
    other = printed(
        capsys,
        *("evaluate", str(trained), "--synthetic", "mqar", "--length", "21", "--rows", "4"),
        *("--set", "num_pairs=5", "--set", "num_keys=6", "--set", "num_values=3"),
    )
    assert (other["answers"], other["sequence_length"], other["chance"]) == (20, 21, pytest.approx(1 / 3))
    assert run(["evaluate", str(trained), "--synthetic", "parity", "--rows", "4"]) == 0
    assert "of 40 tokens; guessing gives 0.5000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--synthetic", "parity", "--split", "train"], "--split has no effect with --synthetic; leave it out"),
        (["--rows", "5"], "--rows has no effect without --synthetic; leave it out"),
        (["--synthetic", "s5"], "the synthetic task s5 has 120 tokens with these settings"),
        ([], "was trained on a synthetic task and knows no text"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    trained: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(["evaluate", str(trained), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_there_is_nothing_to_prepare_and_a_row_can_be_seen(
    trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "task.yaml"
    config.write_text(yaml.safe_dump(synthetic_config(tmp_path / "run").model_dump(mode="json")))
    assert run(["prepare", str(config)]) == 0
    assert "nothing to prepare: data.synthetic.task=selective_copying is computed" in capsys.readouterr().err
    assert printed(capsys, "prepare", str(config)) == {"probe": "selective_copying", "units_written": 0}
    row = printed(capsys, "inspect", str(trained), "--sample", "7")
    assert len(row["tokens"]) == len(row["labels"]) == 10 and row["tokens"][-2:] == [1, 1]
    assert [token for token in row["tokens"] if token > 1] == row["labels"][-2:]
    assert run(["inspect", str(trained), "--sample", "7"]) == 0
    assert f"{row['labels'][-1]} at 9" in capsys.readouterr().out
    assert run(["inspect", "data/store", "--sample", "7", "--config", str(config)]) == 2
    assert "whose sequences no store holds; give only its run directory" in capsys.readouterr().err
