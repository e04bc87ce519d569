"""Settings that had other names are read under the present ones, wherever they are written."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest

from amfm.launch.cli import OLD_NAME, format_warning
from amfm.model.config.old_names import OLD_NAMES, OLD_VALUES, OldNameWarning, current_key
from amfm.model.config.schema import read_saved_model
from amfm.pretrain.checkpoint.compatibility import check_resumable
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.fields import describe_fields, flatten_settings
from amfm.pretrain.config.file import load_config
from amfm.pretrain.config.saved import read_saved_config
from amfm.pretrain.config.schema import RunConfig
from tests.pretrain.config.files import BASE

OLD = """
extends: base.yaml
parallel: {expert: 2, expert_room: 1.5}
low_precision: {recipe: fp8_block, letters: E, saved: fp8, wide_first: 1}
launch: {keep_loaded: false}
stages: [{name: long, steps: 3, parallel: {expert: 2, expert_room: 2}}]
"""
NEW = {
    "parallel.expert_buffer_factor": 1.5,
    "low_precision.block_types": "E",
    "low_precision.activation_storage": "fp8",
    "low_precision.bf16_first_layers": 1,
    "launch.warm_restarts": False,
    "stages.0.parallel.expert_buffer_factor": 2.0,
}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "old.yaml").write_text(OLD)
    return tmp_path / "old.yaml"


def test_every_present_name_is_a_setting_and_no_old_one_is() -> None:
    known = {row.key for row in describe_fields(RunConfig)} | set(RunConfig.model_fields)
    known |= {key.rpartition(".")[0] for key in known}
    assert set(OLD_NAMES.values()) <= known
    assert not set(OLD_NAMES) & known


def test_a_file_with_old_names_means_the_present_ones(old: Path) -> None:
    with pytest.warns(OldNameWarning, match="parallel.expert_room is called parallel.expert_buffer_factor now") as said:
        settings = flatten_settings(load_config(old).model_dump(mode="json"))
    assert {key: settings[key] for key in NEW} == NEW
    assert len(said) == len(NEW)


def test_an_override_by_an_old_name_wins_over_the_file(old: Path) -> None:
    with pytest.warns(OldNameWarning):
        config = load_config(
            old, ["parallel.expert_room=3", "stages.0.parallel.expert_room=4", "model.guide={share: 1}"]
        )
    assert config.parallel.expert_buffer_factor == 3
    assert config.stages[0].parallel is not None and config.stages[0].parallel.expert_buffer_factor == 4
    assert config.model.self_guided_training is not None and current_key("data.probe.task") == "data.synthetic.task"


@pytest.mark.parametrize(("key", "old_value"), [(key, each) for key in OLD_VALUES for each in OLD_VALUES[key]])
def test_an_old_value_is_read_from_files_overrides_stages_and_checkpoints(old: Path, key: str, old_value: str) -> None:
    section, _, name = key.partition(".")
    now = OLD_VALUES[key][old_value]
    both = {section: {"expert": 2, name: old_value}}
    old.write_text(
        f"extends: base.yaml\n{json.dumps(both)[1:-1]}\nstages: [{{steps: 3, name: a, {json.dumps(both)[1:-1]}}}]\n"
    )
    with pytest.warns(OldNameWarning, match=f"{key}={old_value} is called {key}={now} now") as said:
        config = load_config(old)
    assert len(said) == 2 and config.stages[0].parallel is not None
    assert getattr(config.parallel, name) == getattr(config.stages[0].parallel, name) == now
    with pytest.warns(OldNameWarning):
        assert load_config(old.with_name("base.yaml"), [f"{section}.expert=2", f"{key}={old_value}"]) == load_config(
            old.with_name("base.yaml"), [f"{section}.expert=2", f"{key}={now}"]
        )
    saved = config.model_dump(mode="json")
    saved[section][name] = old_value
    manifest = {"step": 1, "config": saved, "identities": {}}
    with pytest.warns(OldNameWarning):
        assert check_resumable(manifest, config, {}) == ()
    assert saved[section][name] == old_value, "and what was read is as it was"


def test_both_names_of_a_setting_are_refused(old: Path) -> None:
    old.write_text("extends: base.yaml\nparallel: {expert_room: 1.5, expert_buffer_factor: 2}\n")
    rule = "parallel.expert_room is the old name of parallel.expert_buffer_factor, and both are given"
    with pytest.raises(ConfigError, match=rule):
        load_config(old)


def test_a_checkpoint_with_old_names_is_resumed(old: Path) -> None:
    with pytest.warns(OldNameWarning):
        config = load_config(old, ["model.guide={share: 0.25}"])
    saved = config.model_dump(mode="json")
    for key, new in OLD_NAMES.items():
        parent = saved
        *parents, name = key.split(".")
        for part in parents:
            parent = parent[part] if parent is not None else None
        if parent is not None:
            parent[name] = parent.pop(new.rpartition(".")[2])
    manifest = {"step": 1, "config": saved, "identities": {}}
    with pytest.warns(OldNameWarning):
        assert read_saved_config(manifest) == config
    with pytest.warns(OldNameWarning):
        assert check_resumable(manifest, config, {}) == ()
    with pytest.warns(OldNameWarning):
        model = read_saved_model(saved["model"], {})  # as exports have it
    assert "guide" in saved["model"] and "guide" not in model
    assert "guide" in saved["model"], "and what was read is as it was"


def test_the_command_says_it_in_a_line(
    old: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warnings, "showwarning", lambda *given: print(warnings.formatwarning(*given[:4]), end=""))
    monkeypatch.setattr(warnings, "formatwarning", format_warning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        current_key("stages.1.parallel.expert_room")
        warnings.warn("other words", FutureWarning, stacklevel=1)
    said, other = capsys.readouterr().out.splitlines()[:2]
    now = "stages.1.parallel.expert_buffer_factor now; the old name is read, write the new one"
    assert said == f"note: stages.1.parallel.expert_room is called {now}"
    assert "FutureWarning: other words" in other and re.match(OLD_NAME, said.removeprefix("note: "))
