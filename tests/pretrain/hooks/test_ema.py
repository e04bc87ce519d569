"""The moving average of weights: by its formula, bitwise over a resume, and as one rank's under every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.launch.cli import run as run_cli
from amfm.pretrain.checkpoint.inspect import read_full_state
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.inference.evaluate import evaluate_checkpoint
from amfm.pretrain.inference.weights import read_weights
from amfm.pretrain.train import train
from tests.helpers.json_output import one_object
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import MODEL, tiny_config

EMA = {"decay": 0.7, "every_steps": 2, "start": 1}
SMALL = {"model__pattern": "E-"}


def with_ema(data: DataConfig, run_dir: Path, ema: dict[str, Any] | None = None, **overrides: Any) -> RunConfig:
    config = tiny_config(data, run_dir, **({"train__steps": 6, "train__keep_last": 9} | SMALL | overrides))
    return RunConfig.model_validate(config.model_dump(mode="json") | {"ema": EMA if ema is None else ema})


def averages(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return dict(read_full_state(run_dir / f"checkpoints/step-{step:08d}", averaged=True))


def test_the_average_is_its_formula_and_evaluates(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(with_ema(data, run, train__checkpoint_every_steps=1)) == 0
    expected: dict[str, torch.Tensor] = {}
    for step in range(1, 7):
        weights = read_full_state(run / f"checkpoints/step-{step:08d}")
        if step == 1:
            expected = {name: weights[name].double() for name in weights}
        elif step % 2 == 0:
            expected = {name: 0.7 * mean + 0.3 * weights[name].double() for name, mean in expected.items()}
        for name, found in averages(run, step).items():
            wanted = weights[name] if name.endswith("expert_bias") else expected[name].float()
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8, msg=name)
    loss = evaluate_checkpoint(read_weights(run, averaged=True), max_tokens=500).loss
    capsys.readouterr()
    assert run_cli(["evaluate", str(run), "--weights", "ema", "--max-tokens", "500", "--json"]) == 0
    assert one_object(capsys.readouterr().out)["loss"] == pytest.approx(loss)
    assert loss != evaluate_checkpoint(run, max_tokens=500).loss
    assert run_cli(["export", str(run), str(tmp_path / "out"), "--weights", "ema", "--no-verify"]) == 0


def test_a_resume_continues_the_average_to_the_bit_and_the_run_is_as_without_one(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, stops in (("straight", [None]), ("resumed", [3, None])):
        for stop in stops:
            assert train(with_ema(data, tmp_path / folder, train__stop_after_steps=stop)) == 0
    straight, resumed = averages(tmp_path / "straight", 6), averages(tmp_path / "resumed", 6)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())
    assert train(tiny_config(data, tmp_path / "plain", train__steps=6, **SMALL)) == 0
    plain, own = (read_full_state(tmp_path / name / "checkpoints/step-00000006") for name in ("plain", "straight"))
    assert all(torch.equal(plain[name], own[name]) for name in plain)
    assert run_cli(["evaluate", str(tmp_path / "plain"), "--weights", "ema"]) == 2
    assert "has no averaged weights; a run keeps them if it has a section `ema`" in capsys.readouterr().err
    # One that begins later begins as the weights.
    begun = with_ema(data, tmp_path / "plain", {"decay": 0.5}, train__steps=7)
    assert train(begun) == 0
    before, after = plain, read_full_state(tmp_path / "plain/checkpoints/step-00000007")
    for name, found in averages(tmp_path / "plain", 7).items():
        wanted = after[name] if name.endswith("expert_bias") else (before[name] + after[name]) / 2
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


LAYOUTS: list[dict[str, Any]] = [
    {"parallel__zero_stage": 0},
    {"parallel__zero_stage": 2},
    {"parallel__zero_stage": 3},
    {"parallel__tensor": 2, "parallel__sequence_parallel": True},
    {"parallel__expert": 2, "parallel__zero_stage": 2},
    {"parallel__pipeline": 2},
    {"parallel__context": 2},
    {"parallel__zero_stage": 2, "parallel__offload_optimizer": True},
]


def train_half(data: DataConfig, root: str, layouts: list[dict[str, Any]], stop: int | None) -> None:
    for number, layout in enumerate(layouts):
        settings = {"train__micro_batch_size": 1, "optimizer__epsilon": 1e-3, "train__stop_after_steps": stop}
        settings |= {"model__pattern": MODEL["pattern"]} | layout
        assert train(with_ema(data, Path(root, str(number)), **settings)) == 0


@pytest.mark.slow
def test_every_layout_keeps_the_average_of_one_rank_and_continues_another_layouts(
    data: DataConfig, tmp_path: Path
) -> None:
    run_ranks(train_half, data, str(tmp_path / "one"), [{}], None, num_ranks=1)
    run_ranks(train_half, data, str(tmp_path / "two"), LAYOUTS, 4)
    run_ranks(train_half, data, str(tmp_path / "two"), [*LAYOUTS[1:], LAYOUTS[0]], None)
    expected = averages(tmp_path / "one/0", 6)
    for number, layout in enumerate(LAYOUTS):
        for name, found in averages(tmp_path / f"two/{number}", 6).items():
            torch.testing.assert_close(found, expected[name], rtol=0, atol=2e-5, msg=f"{layout}: {name}")
