"""Rules of a run on a synthetic task: each broken one names value, rule and fix."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.checks.load import load_checked
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.file import change_section, load_config, resolved_yaml
from tests.pretrain.config.files import BASE

TASK = BASE[: BASE.index("data:")] + "data: {synthetic: {task: mqar}}\n" + BASE[BASE.index("train:") :]


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    path = tmp_path / "task.yaml"
    path.write_text(TASK, encoding="utf-8")
    return path


def broken(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_run(load_config(path, overrides))
    return str(caught.value)


def test_a_run_on_a_synthetic_task_needs_no_store_and_reads_back(task_file: Path, tmp_path: Path) -> None:
    config = load_checked(task_file, [], world_size=2)
    assert config.data.store is None and config.data.sources == ()
    again = tmp_path / "again.yaml"
    again.write_text(resolved_yaml(config))
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.store=x"], "data.store: has no effect on data.synthetic, which is not text; remove one of the two"),
        (["data.tokenizer.vocab_size=512"], "data.tokenizer: has no effect on data.synthetic"),
        (["data.sources=[{name: a, paths: [a]}]"], "data.sources: has no effect on data.synthetic"),
        (["data.phases=[{start_sample: 4, sequence_length: 256}]"], "data.phases: has no effect on data.synthetic"),
        (["data.shuffle=block"], "data.shuffle: has no effect on data.synthetic"),
        (["model.vocab_size=64"], "model.vocab_size = 64: must be at least 65, the tokens of data.synthetic.task=mqar"),
        (["data.synthetic.num_writes=2"], "data.synthetic.num_writes=2 has no effect on the synthetic task mqar"),
        (["data.synthetic.num_pairs=33"], "data.synthetic.num_pairs=33 must be at most num_keys=32"),
        (["data.synthetic.task=s7"], "must be one of: mqar, overwriting, selective_copying, parity, s3, s4, a5, s5"),
        (["train.sequence_length=23"], "train.sequence_length = 23: must be at least 24, the shortest sequence of"),
        (
            ["train.steps=null", "stages=[{name: a, steps: 40}, {name: b, steps: 40, sequence_length: 16}]"],
            "stages.1.sequence_length = 16: must be at least 24",
        ),
        (
            ["train.steps=null", "stages=[{name: a, steps: 40, weights: {mqar: 1}}]"],
            "stages.0.weights: has no effect on data.synthetic, the only source; remove it",
        ),
    ],
)
def test_a_broken_rule_is_explained(task_file: Path, overrides: list[str], message: str) -> None:
    assert message in broken(task_file, *overrides)


def test_a_run_says_how_to_install_a_package_that_is_missing(task_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [place for place in sys.path if not list(Path(place).glob("amfm_synthetic-*"))])
    with pytest.raises(ValueError, match=r"data\.synthetic is in a package .*: pip install \./examples/synthetic"):
        check_run(load_config(task_file))


def test_without_a_synthetic_task_text_is_needed(task_file: Path) -> None:
    message = broken(task_file, "data.synthetic=null", "data.tokenizer.vocab_size=512")
    assert "data.store: is missing; name the folder that `amfm prepare` writes, or give data.synthetic" in message
    assert "data.sources: is missing; name at least one, with name and paths, or give data.synthetic" in message


def test_settings_of_a_section_are_changed_as_overrides_change_a_file(task_file: Path) -> None:
    section = load_config(task_file).data.synthetic
    assert section is not None
    changed = change_section(section, ["num_pairs=3", "num_keys=1e2"])
    assert (changed.num_pairs, changed.num_keys, changed.num_values) == (3, 100, 32)
    with pytest.raises(ConfigError, match=r"override num_pairs=0: must be greater than 0; raise it"):
        change_section(section, ["num_pairs=0"])


def test_the_example_runs_are_sound() -> None:
    paths = sorted((Path(__file__).parents[3] / "configs" / "probes").glob("*.yaml"))
    assert paths and all(load_checked(path, [], world_size=1).data.synthetic for path in paths)
