"""What a step is inspected for adds up to what is known of it, and changes no bit. Layouts: tests/parallel/test_layouts.py."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.kernels.moe.op import route
from amfm.model.moe.balance import add_entropies
from amfm.model.packing import Padding
from tests.pretrain.monitor.test_anomalies import train_with_a_blow
from tests.pretrain.tiny_run import tiny_config, train_and_collect


def test_norms_add_up_and_are_of_the_steps_that_are_due_and_nothing_else_changes(
    data: DataConfig, tmp_path: Path
) -> None:
    plain = train_and_collect(tiny_config(data, tmp_path / "plain"))
    found = train_and_collect(tiny_config(data, tmp_path / "inspected", train__inspect_every_steps=2))
    assert found.series("loss") == plain.series("loss")
    assert all(torch.equal(found.weights[name], weight) for name, weight in plain.weights.items())
    assert ["inspect" in line for line in found.metrics] == [False, True, False, True]
    last = found.metrics[3]
    blocks, groups = last["inspect"]["blocks"], last["inspect"]["groups"]
    total = math.sqrt(sum(norm**2 for norm in groups["gradient"].values()))
    assert total == pytest.approx(last["grad_norm"], rel=1e-6)
    parameters = {name: weight for name, weight in found.weights.items() if not name.endswith("expert_bias")}
    for index in range(4):
        own = [weight for name, weight in parameters.items() if name.startswith(f"blocks.{index}.")]
        norm = math.sqrt(sum(float(weight.double().square().sum()) for weight in own))
        assert blocks["weight"][index] == pytest.approx(norm, rel=1e-6)
    routers = [weight for name, weight in parameters.items() if name.endswith("router.weight")]
    assert groups["weight"]["router"] == pytest.approx(float(torch.cat(routers).double().norm()), rel=1e-6)
    bias_E = found.weights["blocks.1.mixer.expert_bias"]
    assert [blocks[name][1] for name in ("bias_low", "bias_high")] == [float(bias_E.min()), float(bias_E.max())]
    assert [blocks[name] for name in ("max_logit",)] == [[None, None, blocks["max_logit"][2], None]]
    assert 0 < blocks["router_entropy"][1] <= math.log(4)
    top, bottom = (last["inspect"]["experts"][name]["1"] for name in ("top", "bottom"))
    assert top[0][1] == pytest.approx(last["expert_load"]["1"]) and bottom[0][1] < 1 < top[0][1]


def test_updates_are_what_the_step_changed(data: DataConfig, tmp_path: Path) -> None:
    before = train_and_collect(tiny_config(data, tmp_path / "run", model__pattern="E-", train__stop_after_steps=3))
    after = train_and_collect(tiny_config(data, tmp_path / "run", model__pattern="E-", train__inspect_every_steps=4))
    for index, update in enumerate(after.metrics[3]["inspect"]["blocks"]["update"]):
        moved = [
            float((weight.double() - before.weights[name]).square().sum())
            for name, weight in after.weights.items()
            if name.startswith(f"blocks.{index}.") and not name.endswith("expert_bias")
        ]
        assert update == pytest.approx(math.sqrt(sum(moved)), rel=1e-5)


def test_a_step_that_moved_nothing_has_no_update_and_no_number_for_its_gradient(
    data: DataConfig, tmp_path: Path
) -> None:
    settings = {"train__inspect_every_steps": 1, "health__on_spike": "skip"}
    lines = train_with_a_blow(data, str(tmp_path / "run"), settings).metrics
    (skipped, *_) = [line["inspect"] for line in lines if line["skipped"]]
    assert set(skipped["blocks"]["update"]) == {0.0} and "gradient" not in skipped["blocks"]
    assert all(norm is None for norm in skipped["groups"]["gradient"].values())


def test_entropy_is_that_of_the_shares_of_tokens_that_are_no_padding() -> None:
    logits_RE = torch.randn(6, 5, dtype=torch.float64)
    routing = route(logits_RE, None, score="sigmoid", top_k=2, normalize=True, scaling=1.0, backend="torch")
    sums, shares_RE = torch.zeros(2, dtype=torch.float64), torch.sigmoid(logits_RE)
    add_entropies(sums, routing.scores_RE, Padding.of_lengths(torch.tensor([1, 3]), 3))
    shares_RE = shares_RE / shares_RE.sum(1, keepdim=True)
    entropies_R = -(shares_RE * shares_RE.log()).sum(1)
    wanted = float(entropies_R[0] + entropies_R[3:].sum())
    assert sums.tolist() == pytest.approx([wanted, 4.0], rel=1e-12)
