"""The package is found by its entry points or by its folder; without it a message names both, for files and for checkpoints."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import yaml
from amfm_mixers import SPECS

from amfm.data_pipeline.config import DataConfig
from amfm.model.config.plugins import MORE_MIXERS
from tests.helpers.examples import amfm
from tests.pretrain.tiny_run import MODEL, tiny_config, tiny_data

FOLDER = Path(__file__).parent / "amfm_mixers"
REMEDY = "`pip install ./examples/mixers` in a checkout of amfm, or add `plugins: [examples/mixers/amfm_mixers]`"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return tiny_data(tmp_path_factory.mktemp("data"))


def test_entry_points_and_the_table_for_messages_name_every_kind() -> None:
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]
    entries = project["entry-points"]["amfm.mixers"]
    assert entries == {spec.name: f"amfm_mixers.spec:{spec.name.upper()}" for spec in SPECS}
    assert set(entries) == set(MORE_MIXERS) and all(spec.modeling for spec in SPECS)
    installed = Path(__file__).parents[2] / "tests/helpers/installed/amfm_mixers-1.0.dist-info/entry_points.txt"
    assert installed.read_text() == "[amfm.mixers]\n" + "".join(f"{name} = {at}\n" for name, at in entries.items())


def test_a_run_trains_with_the_folder_alone_and_its_checkpoint_asks_for_it(data: DataConfig, tmp_path: Path) -> None:
    tree = tiny_config(data, tmp_path / "run", train__steps=3).model_dump(mode="json", exclude_unset=True)
    mixers = {"lightning": {"num_heads": 2, "head_dim": 4}, "mom": {"mixer": "lightning"}}
    tree["model"] = {**MODEL, "pattern": "L-{mom}-", "mixers": mixers}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    missing = amfm("train", path, packages=[], cwd=tmp_path)
    assert missing.returncode == 2 and REMEDY in " ".join(missing.stderr.split()), missing.stderr
    path.write_text(yaml.safe_dump(tree | {"plugins": [str(FOLDER)]}))
    done = amfm("train", path, packages=[], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words = ("generate", "run", "--prompt", "some", "--max-new-tokens", "2")
    unread = amfm(*words, packages=[], cwd=tmp_path)
    assert unread.returncode == 2 and REMEDY in " ".join(unread.stderr.split()), unread.stderr
    read = amfm("--plugins", FOLDER, *words, packages=[], cwd=tmp_path)
    assert read.returncode == 0, read.stderr
