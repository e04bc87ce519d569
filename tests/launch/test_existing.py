"""Paths that are not there, and what is named in their place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from amfm.launch.existing import require, require_model

# Command lines, then what each ended with and whether torch was imported by then.
LISTED = """
import contextlib, io, json, sys
from amfm.launch.cli import run
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        code = run(words)
    print(json.dumps([code, errors.getvalue(), "torch" in sys.modules]))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("configs/nemotron3_nano_30b.yaml", "configs/tiny_cpu.yaml", "runs/first/config.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "runs/step-00000005").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("configs/nemotron3_nano.yaml", "configs/nemotron3_nano_30b.yaml"),
        ("config/tiny_cpu.yaml", "configs/tiny_cpu.yaml"),
        ("configs/tiny_gpu.yaml", "configs/tiny_cpu.yaml"),
        ("runs/fist", "runs/first"),
    ],
)
def test_a_path_that_is_spelled_nearly_right_is_answered_with_the_right_one(here: Path, given: str, meant: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"^{given} does not exist; did you mean {meant}\?$"):
        require(Path(given), "name another")


def test_a_path_without_a_near_one_keeps_its_remedy_and_a_name_of_the_hub_gets_its_download(here: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^runs/nope does not exist; name another$"):
        require(Path("runs/nope"), "name another")
    with pytest.raises(FileNotFoundError, match=r"hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B, then name"):
        require_model(Path("Qwen/Qwen3-0.6B"))
    with pytest.raises(ValueError, match=r"^configs/tiny_cpu.yaml is a file; name the folder of a model$"):
        require_model(Path("configs/tiny_cpu.yaml"))
    assert require(Path("s3://bucket/store"), "") == Path("s3://bucket/store")


REFUSED = [
    (["serve", "runs/nope"], "runs/nope does not exist"),
    (["plan", "configs/nemotron3_nano.yaml", "--gpus", "8"], "did you mean configs/nemotron3_nano_30b.yaml?"),
    (["plan", "configs/granite4_h_small.yaml", "--gpus", "8"], "--preset granite4_h_small"),
    (["plan", "configs/tiny_cpu.yaml", "--gpus", "8", "--gpu", "h1000"], "use h100"),
    (["import", "runs/first", "configs"], "configs exists and is not empty"),
    (["export", "runs/first", "configs/tiny_cpu.yaml"], "configs/tiny_cpu.yaml is a file; name a folder"),
    (["train", "--preset", "tiny_cpu", "train.step=9"], "did you mean train.steps?"),
    (["prepare", "--preset", "tiny_cpu", "train.steps=-9"], "train.steps=-9: must be"),
    (["plan", "--preset", "tiny_cpu", "--gpus", "1", "model.hidden_size=0"], "model.hidden_size=0: must be"),
    (["export", "runs/step-00000005", "exports/new"], "the checkpoint was never completed"),
]


def test_paths_gpus_and_settings_are_judged_before_torch_is_imported(here: Path) -> None:
    command = [sys.executable, "-c", LISTED, json.dumps([arguments for arguments, _ in REFUSED])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    codes = [3 if "checkpoint" in said else 2 for _, said in REFUSED]
    assert [(code, with_torch) for code, _, with_torch in answers] == [(code, False) for code in codes], done.stderr
    for (arguments, said), (_, errors, _) in zip(REFUSED, answers):
        assert said in errors, arguments
