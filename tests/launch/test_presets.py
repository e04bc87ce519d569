"""Presets by name: what there is, what is rejected, and that a verb takes one instead of a file."""

from __future__ import annotations

import pytest

from amfm.launch.cli import run
from amfm.launch.existing import preset_names, preset_path


def test_every_preset_is_a_run_that_can_be_named() -> None:
    names = preset_names()
    assert {"tiny_cpu", "nemotron3_nano_30b", "probes/mqar"} <= set(names)
    assert not [name for name in names if name.startswith(("base/", "studies/", "anchors/"))]
    assert all(preset_path(name).is_file() for name in names)


def test_a_verb_takes_a_preset_and_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "--preset", "tiny_cpu", "train.steps=321", "run.dir=elsewhere"]) == 0
    shown = capsys.readouterr().out
    assert "steps: 321" in shown and "dir: elsewhere" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["config", "--preset", "tiny_gpu"],
            "--preset tiny_gpu: amfm has no preset of this name; do you mean tiny_cpu?",
        ),
        (["train", "--preset", "../secret"], "has no preset of this name"),
        (["train", "own.yaml", "--preset", "tiny_cpu"], "own.yaml and --preset tiny_cpu both name a configuration"),
        (["train", "elsewhere/tiny_cpuu.yaml"], "tiny_cpuu.yaml does not exist; did you mean --preset tiny_cpu?"),
        (["prepare"], "no CONFIG.yaml given; name a file, or a preset: --preset tiny_cpu"),
    ],
)
def test_a_name_that_is_none_two_configurations_and_none_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == 2
    assert message in " ".join(capsys.readouterr().err.split())
