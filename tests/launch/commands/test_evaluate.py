"""Verbs that use a trained model: what they accept."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from amfm.data_pipeline.config import DataConfig, TokenizerConfig
from amfm.launch.cli import run
from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.train import train
from tests.helpers.srun import NODES, write_programs
from tests.pretrain.tiny_run import tiny_config, tiny_data


@pytest.mark.parametrize(
    "arguments",
    [["evaluate", "RUN"], ["generate", "RUN", "--prompt", "x"], ["export", "RUN", "OUT"]],
    ids=["evaluate", "generate", "export"],
)
def test_verbs_that_use_a_model_say_what_they_accept(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"RUN": str(tmp_path / "empty"), "OUT": str(tmp_path / "out")}
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        assert run([places.get(word, word) for word in arguments]) == 2
        assert "is not a checkpoint, run directory or imported model; give RUN_DIR" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        # And then a token store, whose manifest has the name of a checkpoint's.
        (tmp_path / "empty" / "parts").mkdir(exist_ok=True)
        (tmp_path / "empty" / "manifest.json").write_text('{"format": "amfm token store"}')


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is absent")
def test_an_absent_device_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", str(tmp_path), "--prompt", "x", "--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("amfm: --device cuda needs a CUDA device, and torch sees none")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory of which nothing but its configuration is there."""
    folder = tmp_path / "run"
    folder.mkdir()
    data = DataConfig(store=str(tmp_path / "store"), tokenizer=TokenizerConfig(vocab_size=448))
    config = tiny_config(data, folder, launch__slurm={"gpus": False, "partition": "long"})
    (folder / "config.yaml").write_text(resolved_yaml(config))
    return folder


def test_slurm_gets_a_job_of_the_run_that_evaluates(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    for name, text in (("sbatch", "echo Submitted batch job 7"), ("squeue", ":")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    options = ["--tasks", "arc_easy,hellaswag", "--limit", "9", "--set", "a=1", "--json"]
    assert run(["evaluate", str(run_dir), *options, "--nproc", "4", "--nodes", "2", "--on", "slurm"]) == 2
    assert "--set has no effect without --synthetic" in capsys.readouterr().err
    options = options[:4] + options[6:]
    assert run(["evaluate", str(run_dir), *options, "--nproc", "4", "--nodes", "2", "--on", "slurm"]) == 0
    assert capsys.readouterr().out == "Submitted batch job 7\n"
    script = (run_dir / "launch" / "evaluate.sbatch").read_text().splitlines()
    assert "#SBATCH --nodes=2" in script and "#SBATCH --partition=long" in script
    words = f"evaluate {run_dir} --tasks arc_easy,hellaswag --limit 9 --json"
    assert script[-1].endswith(f"{words} --nproc 4 --nodes 2 --on slurm")
    assert script[script.index("set -e") - 1].endswith(words)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "2"], "--nodes 2 has no effect without --on; add --on slurm, or leave it out"),
        (["--nproc", "2", "--synthetic", "mqar"], "--nproc has no effect with --synthetic; leave it out"),
        (["--precision", "bf16", "--synthetic", "mqar"], "--precision has no effect with --synthetic; leave it out"),
        (["--on", "slurm"], "--on slurm reads the section launch of a run, and"),
    ],
)
def test_options_of_ranks_that_nothing_would_read_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "import").mkdir()
    assert run(["evaluate", str(tmp_path / "import"), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_of_one_machine_and_of_slurm_print_what_one_rank_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    slurm = {"launch__slurm": {"gpus": False}}
    assert (
        train(tiny_config(tiny_data(tmp_path / "data"), folder, train__steps=2, schedule__warmup_steps=1, **slurm)) == 0
    )
    asked = ["evaluate", str(folder), "--max-tokens", "300", "--precision", "float32", "--json"]

    def printed(*more: str) -> dict[str, Any]:
        capfd.readouterr()
        assert run([*asked, *more]) == 0
        out, errors = capfd.readouterr()
        line = next(line for line in (out + errors).splitlines() if '"loss"' in line or line.lstrip("0: ") == "{")
        text = (out + errors)[(out + errors).index(line) :]
        return dict(json.loads(re.sub(r"^0: ", "", text[: text.rindex("}") + 1], flags=re.MULTILINE)))

    one = printed()
    assert printed("--nproc", "2")["loss"] == pytest.approx(one["loss"], rel=1e-5)
    write_programs(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", str(os.getpid()))
    monkeypatch.setenv("SLURM_JOB_NODELIST", ",".join(NODES))
    assert printed("--on", "slurm", "--nodes", "2")["loss"] == pytest.approx(one["loss"], rel=1e-5)
