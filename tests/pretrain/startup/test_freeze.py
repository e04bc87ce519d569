"""Parameters that `train.freeze` names stay as they are bitwise, on one rank and on several, and when a run resumes."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.errors import ConfigError
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import Trained, tiny_config, train_and_collect

FROZEN = ("embedding", "blocks.1", "blocks.*.norm", "final_norm.weight")
NAMES = ("embedding.*", "blocks.1.*", "blocks.*.norm.*", "final_norm.weight")
ONE = [("whole", {}), ("cut", {"train__stop_after_steps": 1}), ("cut", {})]
TWO = [("tensor", {"parallel__tensor": 2})]
TWO_MORE = [("zero2", {"parallel__zero_stage": 2}), ("pipeline", {"parallel__pipeline": 2})]


def train_frozen(data: DataConfig, folder: str, runs: list[tuple[str, dict[str, Any]]]) -> list[Trained]:
    """Train up to three steps per run, in the folder of its name. Every rank must call this."""
    common = {"train__steps": 3, "train__freeze": FROZEN, "model__pattern": "*E"}
    return [train_and_collect(tiny_config(data, Path(folder, name), **common | own)) for name, own in runs]


@pytest.mark.parametrize("layouts", [TWO, pytest.param(TWO_MORE, marks=pytest.mark.slow)], ids=["quick", "more"])
def test_what_is_frozen_stays_and_the_rest_trains_alike_on_two_ranks_and_resumed(
    data: DataConfig, tmp_path: Path, layouts: list[tuple[str, dict[str, Any]]]
) -> None:
    one, _, resumed = run_ranks(train_frozen, data, str(tmp_path / "one"), ONE, num_ranks=1)[0]
    config = tiny_config(data, tmp_path, model__pattern="*E")
    first = HybridModel(config.model, single_rank_groups(), seed=config.train.seed)
    for name, weight in first.named_parameters():
        frozen = any(fnmatchcase(name, pattern) for pattern in NAMES)
        assert torch.equal(one.weights[name], weight) == frozen, name
        assert torch.equal(one.weights[name], resumed.weights[name]), name
    assert one.metrics[-1]["loss"] == resumed.metrics[-1]["loss"]
    for (layout, _), run in zip(layouts, run_ranks(train_frozen, data, str(tmp_path / "two"), layouts, num_ranks=2)[0]):
        # float32 sums of another order
        assert run.series("loss") == pytest.approx(one.series("loss"), rel=1e-6), layout
        assert run.series("grad_norm") == pytest.approx(one.series("grad_norm"), rel=1e-5), layout


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("blocks.7",), "train.freeze names blocks.7, and the model has no such parameter or module; names begin with"),
        (("*",), "train.freeze leaves rank 0 nothing to train"),
    ],
)
def test_names_without_a_parameter_and_a_model_without_training_are_refused(
    data: DataConfig, tmp_path: Path, patterns: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train_and_collect(tiny_config(data, tmp_path / "run", train__freeze=patterns))


def test_layouts_that_cut_frozen_weights_are_refused(data: DataConfig, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path, train__freeze=("head",), parallel__zero_stage=3)
    with pytest.raises(ConfigError, match=r"parallel\.zero_stage = 3: cuts frozen weights over ranks too"):
        check_run(config)
