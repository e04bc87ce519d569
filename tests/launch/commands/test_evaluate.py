"""Verbs that use a trained model: what they accept."""

import pytest
import torch

from amfm.launch.cli import run


@pytest.mark.parametrize(
    "arguments",
    [["evaluate", "RUN"], ["generate", "RUN", "--prompt", "x"], ["export", "RUN", "OUT"]],
    ids=["evaluate", "generate", "export"],
)
def test_verbs_that_use_a_model_say_what_they_accept(arguments, tmp_path, capsys):
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
def test_an_absent_device_is_bad_input(tmp_path, capsys):
    assert run(["generate", str(tmp_path), "--prompt", "x", "--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("amfm: --device cuda needs a CUDA device, and torch sees none")
