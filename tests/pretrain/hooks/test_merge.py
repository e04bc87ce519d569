"""The mean of the last checkpoints is validated next to the run, which stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.export.average import Merge, read_merge
from amfm.pretrain.hooks.validate import Validations, validate
from amfm.pretrain.inference.weights import write_weights
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.report.data import read_run
from amfm.pretrain.report.plots import validation_sets_plot
from amfm.pretrain.start import close_run, start_run
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import Trained, read_events, read_metrics, tiny_config, train_and_collect

SMALL = {"model__pattern": "E-"}
EVERY = {"train__validate_every_steps": 2, "train__checkpoint_every_steps": 1}
MERGED = EVERY | {"evaluate__merge_last": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"parallel__tensor": 2, "parallel__sequence_parallel": True},
    "expert": {"parallel__expert": 2, "parallel__zero_stage": 2},
    "pipeline": {"parallel__pipeline": 2},
    "context": {"parallel__context": 2},
}


def test_the_merge_has_the_loss_of_its_weights_and_the_run_does_not_change(data: DataConfig, tmp_path: Path) -> None:
    plain = train_and_collect(tiny_config(data, tmp_path / "plain", **SMALL, **EVERY))
    merged = train_and_collect(tiny_config(data, tmp_path / "run", **SMALL, **MERGED))
    assert [line["loss"] for line in merged.metrics] == [line["loss"] for line in plain.metrics]
    for name, weight in plain.weights.items():
        assert torch.equal(weight, merged.weights[name]), name
    # At step 2 there is one checkpoint; at step 4 those of steps 2 and 3, for its own is saved afterwards.
    found = [line.get("validation_sets") for line in merged.metrics]
    assert found[:3] == [None] * 3 and set(found[3]) == {"merge_last_2"}
    (event,) = [event for event in read_events(tmp_path / "run", "validation") if "set" in event]
    assert event["steps"] == [2, 3] and event["loss"] == found[3]["merge_last_2"]
    plot = validation_sets_plot(read_run(tmp_path / "run"))
    assert plot is not None and [curve.name for curve in plot.curves] == ["merge_last_2"]
    assert found[3]["merge_last_2"] == pytest.approx(loss_of(data, tmp_path, (2, 3)), rel=1e-6)


def loss_of(data: DataConfig, folder: Path, steps: tuple[int, ...]) -> float:
    """Validation loss of a run that begins with these checkpoints' mean."""
    (folder / "merged").mkdir()
    write_weights(folder / "merged", read_merge(folder / "run", Merge(steps, (0.5, 0.5))))
    with SignalWatch() as signals:
        given = {"run__initial_weights": str(folder / "merged")} | SMALL
        run = start_run(tiny_config(data, folder / "again", **given), signals)
        loader = next(hook for hook in run.hooks if isinstance(hook, Validations)).loader
        assert loader is not None
        loss = validate(run, loader).loss
        close_run(run)
    return loss


def train_layout(data: DataConfig, folder: str, name: str) -> Trained:
    settings = MERGED | {"train__micro_batch_size": 1} | LAYOUTS.get(name, {})
    return train_and_collect(tiny_config(data, Path(folder, name), **settings))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_finds_the_loss_of_one_rank(data: DataConfig, tmp_path: Path, name: str) -> None:
    run_ranks(train_layout, data, str(tmp_path), "one", num_ranks=1)
    run_ranks(train_layout, data, str(tmp_path), name, num_ranks=2)
    found, expected = (read_metrics(tmp_path / each)[-1]["validation_sets"] for each in (name, "one"))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train__checkpoint_every_steps": 3},
            "needs as many checkpoints, and train.checkpoint_every_steps saves 1 in 4",
        ),
        ({"evaluate__merge_last": 4}, "must be at most train.keep_last=3; use train.keep_last=4"),
        ({"parallel__zero_stage": 3}, "parallel.zero_stage=3 cuts weights over ranks"),
    ],
)
def test_a_merge_that_cannot_be_is_refused(
    data: DataConfig, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"evaluate.merge_last.*{message}"):
        check_run(tiny_config(data, tmp_path, **(MERGED | changes)), 1)
