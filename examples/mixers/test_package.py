"""The package is found by its entry points or by its folder; without it a message names both, for files and for checkpoints."""

from __future__ import annotations

import json
import os
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from amfm_mixers import SPECS

from amfm.data_pipeline.config import DataConfig
from amfm.model.config.plugins import MORE_MIXERS
from tests.helpers.examples import ROOT
from tests.helpers.processes.zygote import BARE, run_program
from tests.pretrain.tiny_run import MODEL, tiny_config, tiny_data

FOLDER = Path(__file__).parent / "amfm_mixers"
REMEDY = "`pip install ./examples/mixers` in a checkout of amfm, or add `plugins: [examples/mixers/amfm_mixers]`"
PROGRAM = """
import json, sys
from amfm.launch.cli import run
codes = [run(words) for words in json.loads(sys.argv[1])]
print("\\n" + json.dumps(codes))
"""


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
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "named.yaml").write_text(yaml.safe_dump(tree | {"plugins": [str(FOLDER)]}))
    fails_without_it(tmp_path, ["train", "run.yaml"], ["train", "named.yaml"])
    words = ["generate", "run", "--prompt", "some", "--max-new-tokens", "2"]
    fails_without_it(tmp_path, words, ["--plugins", str(FOLDER), *words])


def fails_without_it(folder: Path, without: list[str], with_it: list[str]) -> None:
    """Run two command lines in one process, where the package is not installed."""
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps([without, with_it])]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = run_program(command, env=environment, cwd=folder, zygote=BARE)
    assert done.stdout.splitlines()[-1:] == ["[2, 0]"], done.stdout + done.stderr
    assert REMEDY in " ".join(done.stderr.split()), done.stderr
