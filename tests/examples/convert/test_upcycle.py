"""Sparse upcycling: experts in copies and slices compute what the dense model did, and train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from amfm_convert.rules import check_conversion
from amfm_convert.upcycle import upcycled
from torch import Tensor

from amfm.data_pipeline.config import DataConfig
from amfm.launch.cli import run
from amfm.model.on_demand import on_demand
from amfm.model.packing import PackMeta
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.inference.weights import Weights, read_weights
from amfm.pretrain.train import train
from tests.examples.convert.conversions import MODEL, train_teacher
from tests.pretrain.tiny_run import read_metrics, tiny_config

IDS_BT = torch.randint(0, 448, (2, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def teacher(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_teacher(data, tmp_path_factory.mktemp("dense"))


def upcycling(
    data: DataConfig, folder: Path, teacher: Path, model: dict[str, Any] = MODEL, **settings: Any
) -> RunConfig:
    """The configuration of an upcycling into two copies."""
    tree = tiny_config(data, folder / "upcycled").model_dump(mode="json")
    tree["train"]["steps"], tree["model"] = None, model
    blocks = {name: settings.pop(name) for name in ("keep_blocks", "transfer") if name in settings}
    tree["convert"] = {"teacher": str(teacher), "upcycle": {"num_copies": 3} | settings} | blocks
    return RunConfig.model_validate(tree)


def logits_in_float64(weights: Weights) -> Tensor:
    """Logits of a model whose weights are widened to float64."""
    with torch.no_grad():
        found = weights.build().double()(IDS_BT, PackMeta.one_document_a_row(*IDS_BT.shape)).logits_BTV
    assert found is not None
    return found


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@pytest.mark.parametrize("num_slices", [1, 2, 4])
def test_copies_in_slices_compute_what_the_dense_model_does(
    data: DataConfig, teacher: Path, tmp_path: Path, num_slices: int, router: str
) -> None:
    config = upcycling(data, tmp_path, teacher, num_slices=num_slices, router=router, keep_blocks=[1])
    check_conversion(config)
    dense = read_weights(teacher)
    made = upcycled(config, dense)
    assert (made.model.pattern, made.model.moe.num_experts, made.model.moe.top_k) == (
        "*-*E",
        3 * num_slices,
        2 * num_slices,
    )
    # The same products in float64, in another order; logits of order 1.
    assert (logits_in_float64(made) - logits_in_float64(dense)).abs().max() < 1e-10


def test_gated_feed_forwards_are_cut_in_gate_and_up_alike(data: DataConfig, tmp_path: Path) -> None:
    model = MODEL | {"feed_forward": {"hidden_size": 48, "activation": "swiglu"}}
    run_dir = tmp_path / "teacher"
    assert train(RunConfig.model_validate(tiny_config(data, run_dir).model_dump(mode="json") | {"model": model})) == 0
    dense = read_weights(run_dir)
    made = upcycled(upcycling(data, tmp_path, run_dir, model, num_slices=3), dense)
    assert (logits_in_float64(made) - logits_in_float64(dense)).abs().max() < 1e-10


def test_noise_and_reset_part_the_copies_the_same_in_every_read(
    data: DataConfig, teacher: Path, tmp_path: Path
) -> None:
    dense = read_weights(teacher)
    name = "blocks.1.mixer.experts.up"
    plain = on_demand(upcycled(upcycling(data, tmp_path, teacher), dense).state)[name]
    assert plain[0].equal(plain[1])
    half = on_demand(upcycled(upcycling(data, tmp_path, teacher, reset=0.5), dense).state)
    is_new = (half[name] != plain).any(-1)
    assert 0.3 < is_new.double().mean() < 0.7 and not is_new[0].equal(is_new[1])
    assert half[name].equal(torch.cat([half.rows(name, (0, 2)), half.rows(name, (2, 3))]))
    other = (
        half["blocks.1.mixer.experts.down"]
        != on_demand(upcycled(upcycling(data, tmp_path, teacher), dense).state)["blocks.1.mixer.experts.down"]
    )
    assert other.any(1).equal(is_new)
    noisy = on_demand(upcycled(upcycling(data, tmp_path, teacher, noise=0.1), dense).state)[name]
    assert ((noisy - plain).std() / plain.std()).item() == pytest.approx(0.1, rel=0.1)


def test_the_command_writes_a_model_that_a_run_trains_on(
    data: DataConfig, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "upcycle.yaml"
    config = upcycling(data, tmp_path, teacher, num_slices=2)
    file.write_text(resolved_yaml(config))
    assert run(["convert", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pattern"] == "*E*E" and found["max_logit_difference"] < 1e-4
    assert found["losses"][0] == pytest.approx(found["losses"][1], abs=1e-5)
    result = Path(found["result"])
    model = yaml.safe_load((result / "model.yaml").read_text())["model"]
    model["moe"]["auxiliary_loss_weight"] = 0.01
    tree = tiny_config(data, tmp_path / "on", train__steps=3, run__initial_weights=str(result)).model_dump(mode="json")
    assert train(RunConfig.model_validate(tree | {"model": model})) == 0
    assert len(read_metrics(tmp_path / "on")) == 3
    assert run(["convert", str(file)]) == 2  # the result is there


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_slices": 5}, "convert.upcycle.num_slices = 5: must divide model.feed_forward.hidden_size=48"),
        ({"top_copies": 4}, "convert.upcycle.top_copies = 4: is more than convert.upcycle.num_copies=3"),
        ({"transfer": {"steps": 3}}, "convert.transfer: has no effect with convert.upcycle"),
        (
            {"keep_blocks": [0]},
            r"convert.keep_blocks = 0: is \* \(.*\), and only feed-forward \(-\) is converted; use some of 1, 3",
        ),
        ({"keep_blocks": [1, 3]}, "keeps every feed-forward block"),
    ],
)
def test_what_does_not_fit_is_named(data: DataConfig, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_conversion(upcycling(data, tmp_path, tmp_path, **settings))
