"""Settings of a package of examples/ that is not installed name the package and the command that installs it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from amfm.model.config.kinds import find_kind
from amfm.model.config.plugins import EXAMPLES, leave_out_unset
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.file import load_config

ROOT = Path(__file__).parents[3]


def test_the_table_has_every_mixer_and_hook_of_examples() -> None:
    found = {}
    for file in ROOT.glob("examples/*/pyproject.toml"):
        project = tomllib.loads(file.read_text())["project"]
        needed = [name for name in project["dependencies"] if "amfm-" in name and "amfm-pretrain" not in name]
        folders = [*(name.removeprefix("amfm-").replace("-", "_") for name in needed), file.parent.name]
        for group in ("amfm.mixers", "amfm.hooks", "amfm.adapters"):
            found |= dict.fromkeys(project.get("entry-points", {}).get(group, {}), tuple(folders))
    assert found == EXAMPLES


def test_a_block_and_a_section_that_are_not_there_come_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"install amfm-longvq.*`pip install \./examples/mixers \./examples/seqboat \./examples/longvq`",
    ):
        find_kind("longvq")
    with pytest.raises(ValueError, match=r"install amfm-fourier-head.*`pip install \./examples/fourier_head`"):
        find_kind("fourier_head")
    text = (ROOT / "configs" / "tiny_cpu.yaml").read_text()
    (tmp_path / "run.yaml").write_text(text + "\nhooks:\n  envelope: {keep: 0.5}\n")
    with pytest.raises(ConfigError, match=r"hooks\.envelope.*`pip install \./examples/envelope`"):
        load_config(tmp_path / "run.yaml", [])


def test_unset_sections_of_mixers_that_became_a_package_are_left_out_as_runs_of_before_have_them() -> None:
    # The tests have the packages installed, so that only what is left shows it.
    settings: dict[str, Any] = {"model": {"mixers": {**dict.fromkeys(EXAMPLES), "kda": None, "gla": {"num_heads": 2}}}}
    leave_out_unset(settings)
    assert settings == {"model": {"mixers": {"kda": None, "gla": {"num_heads": 2}}}}


def test_null_removes_the_section_of_a_package_that_the_extended_file_sets(tmp_path: Path) -> None:
    text = (ROOT / "configs" / "tiny_cpu.yaml").read_text()
    (tmp_path / "base.yaml").write_text(text)
    (tmp_path / "more.yaml").write_text("extends: base.yaml\nmodel: {mixers: {retnet: {num_heads: 4, head_dim: 8}}}\n")
    (tmp_path / "less.yaml").write_text("extends: more.yaml\nmodel: {mixers: {retnet: null}}\n")
    assert load_config(tmp_path / "more.yaml", ["model.pattern={retnet}*"]).model.mixers.retnet is not None
    assert load_config(tmp_path / "less.yaml").model.mixers.retnet is None
    assert load_config(tmp_path / "more.yaml", ["model.mixers.retnet=null"]).model.mixers.retnet is None
