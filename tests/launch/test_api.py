"""A notebook's way through amfm: load, plan, train, read, generate."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from amfm.launch import api
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.inference.generate import Sampling
from tests.pretrain.tiny_run import tiny_config, tiny_data


def test_a_run_from_its_file_to_a_text(tmp_path: Path) -> None:
    tree = tiny_config(tiny_data(tmp_path / "data"), tmp_path / "run").model_dump(mode="json", exclude_unset=True)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"run\.yaml|override train.stepz"):
        api.load(tmp_path / "run.yaml", "train.stepz=1")
    config = api.load(tmp_path / "run.yaml", "train.steps=3")
    made = api.plan(config, gpus=1)
    assert made.counts.total > 0 and made.own.fits()
    assert api.prepare(config).units_written == 0, "the store is there"
    run = api.train(config)
    assert run.is_finished() and run.series("loss")[0] == [1, 2, 3]
    assert api.read_run(config.run.dir).last("loss") == run.last("loss")
    model = api.load_model(config.run.dir)
    first, again = (model.generate("some", 5, Sampling(seed=1)) for _ in range(2))
    assert first == again != model.generate("some", 5, Sampling(seed=2))
    with pytest.raises(ValueError, match="the prompt is empty"):
        model.generate("")
