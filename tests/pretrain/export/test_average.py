"""Merged checkpoints are the weighted mean of their weights, and every reader of weights takes them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.launch.cli import run as run_cli
from amfm.model.moe.block import PRUNED_BIAS
from amfm.pretrain.export.average import average, merge_shares
from amfm.pretrain.inference.weights import read_weights
from amfm.pretrain.train import train
from tests.helpers.json_output import one_object
from tests.pretrain.export.exported_models import random_weights
from tests.pretrain.tiny_run import MODEL, tiny_config

STEPS = (2, 4, 6)


@pytest.fixture(scope="module")
def run_dir(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three checkpoints."""
    folder = tmp_path_factory.mktemp("merge") / "run"
    assert train(tiny_config(data, folder, train__steps=6, train__checkpoint_every_steps=2)) == 0
    return folder


def test_wsm_weights_stand_for_a_decay_by_one_minus_sqrt() -> None:
    shares = merge_shares("wsm", 8)
    assert sum(shares) == pytest.approx(1)
    # An update between two checkpoints counts with the sum of the weights from there on.
    left = [sum(shares[place:]) for place in range(1, 8)]
    assert left == pytest.approx([1 - math.sqrt(place / 8) for place in range(1, 8)])
    assert merge_shares("uniform", 4) == (0.25,) * 4
    assert merge_shares("linear", 3) == pytest.approx((1 / 6, 2 / 6, 3 / 6))


def test_a_merge_is_the_mean_and_starts_evaluates_and_exports(
    run_dir: Path, data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert run_cli(["merge", str(run_dir), str(out), "--steps", "2,4,6", "--weights", "0.5,0.3,0.2", "--json"]) == 0
    assert one_object(capsys.readouterr().out)["best"]["steps"] == list(STEPS)
    states = [read_weights(run_dir / f"checkpoints/step-0000000{step}").state for step in STEPS]
    merged = read_weights(out)
    assert merged.state.keys() == states[0].keys()
    for name, tensor in merged.state.items():
        wanted = sum(share * state[name].double() for share, state in zip((0.5, 0.3, 0.2), states)).float()
        torch.testing.assert_close(tensor, wanted, rtol=1.2e-7, atol=0, msg=name)  # one rounding
    bias = merged.state["blocks.1.mixer.expert_bias"]
    assert bias.any(), "the router's bias is merged too"
    assert run_cli(["evaluate", str(out), "--data", data.store, "--max-tokens", "500"]) == 0
    assert run_cli(["export", str(out), str(tmp_path / "export"), "--no-verify"]) == 0
    continued = tiny_config(data, tmp_path / "on", train__steps=1, schedule__warmup_steps=0)
    continued = continued.model_copy(update={"run": continued.run.model_copy(update={"initial_weights": str(out)})})
    assert train(continued) == 0


def test_the_best_of_several_merges_is_written(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["merge", str(run_dir), "--last", "1,3", "--weights", "wsm", "--evaluate", "--max-tokens", "500"]
    assert run_cli([*command, "--json"]) == 0
    found = one_object(capsys.readouterr().out)
    assert found["path"] is None and [merge["steps"] for merge in found["merges"]] == [[6], [2, 4, 6]]
    assert found["best"] == min(found["merges"], key=lambda merge: merge["loss"])
    assert run_cli([command[0], command[1], str(tmp_path / "best"), *command[2:]]) == 0
    assert json.loads((tmp_path / "best/weights.json").read_text())["origin"].count("(step ") == len(
        found["best"]["steps"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["OUT", "--last", "8"], "--last 8: RUN has checkpoints of steps 2, 4, 6; train.keep_last"),
        (["OUT", "--steps", "2,5"], "--steps 5: RUN has checkpoints of steps 2, 4, 6"),
        (["OUT", "--steps", "2,2"], "names a step twice"),
        (["OUT", "--last", "2", "--weights", "0.5,0.4"], "add up to 0.9; they must add up to 1"),
        (["OUT", "--last", "2", "--weights", "nan,1"], "add up to nan"),
        (["OUT", "--last", "2", "--weights", "1"], "has 1 numbers for 2 checkpoints"),
        (["OUT", "--last", "2", "--weights", "cosine"], "is none of uniform, wsm, linear, nor numbers"),
        (["OUT", "--last", "0"], "must be integers above 0"),
        (["OUT", "--last", "2,3"], "names several merges; with --evaluate the best is chosen"),
        (["OUT"], "give --last N or --steps A,B,C"),
        (["--last", "2"], "OUT is missing"),
    ],
)
def test_bad_input_is_named_and_nothing_written(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    words = [str(tmp_path / "out") if word == "OUT" else word for word in arguments]
    assert run_cli(["merge", str(run_dir), *words]) == 2
    assert message.replace("RUN", str(run_dir)) in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_other_shapes_are_refused_and_pruned_experts_stay_pruned(data: DataConfig) -> None:
    one = random_weights(data, MODEL)
    other = random_weights(data, MODEL | {"feed_forward": {"hidden_size": 40}})
    with pytest.raises(ValueError, match=r"hold other tensors: blocks\.3\.mixer\.down_proj\.weight is \(32, 40\)"):
        average([other, replace(one, step=2)], (0.5, 0.5))
    state = {name: tensor.clone() for name, tensor in one.state.items()}
    state["blocks.1.mixer.expert_bias"][2] = PRUNED_BIAS
    bias = average([one, replace(one, state=state, step=2)], (0.5, 0.5)).state["blocks.1.mixer.expert_bias"]
    assert bias[2] == PRUNED_BIAS and (bias[[0, 1, 3]].abs() < 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_merge_at_a_constant_rate_is_better_than_the_last_checkpoint(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    settings = {"schedule__kind": "constant", "optimizer__learning_rate": 1e-2, "train__seed": seed}
    saves = {"train__checkpoint_every_steps": 20, "train__keep_last": 8, "train__steps": 300}
    assert train(tiny_config(data, tmp_path / "run", **settings, **saves)) == 0
    capsys.readouterr()
    losses = {}
    for weights in ("uniform", "wsm"):
        command = ["merge", str(tmp_path / "run"), "--last", "1,8", "--evaluate", "--weights", weights, "--json"]
        assert run_cli(command) == 0
        last, merged = one_object(capsys.readouterr().out)["merges"]
        losses[weights] = merged["loss"]
        assert merged["loss"] < last["loss"] - 0.02, (weights, last, merged)
    print(json.dumps({"seed": seed, "last": last["loss"]} | losses))
