"""Zero groups are taken out of a model: smaller tensors, the same logits, a folder that exports and trains on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from amfm_compact.shrink import shrink_weights

from amfm.data_pipeline.config import DataConfig
from amfm.launch.cli import run as run_cli
from amfm.model.moe.block import PRUNED_BIAS
from amfm.pretrain.export.export import LOGIT_TOLERANCE, RELATIVE_TOLERANCE, export_checkpoint, logit_difference
from amfm.pretrain.inference.weights import Weights, read_weights, write_weights
from tests.pretrain.export.exported_models import OWN, random_weights
from tests.pretrain.tiny_run import MODEL

PATTERN = "ME*-E-"


def pruned_weights(data: DataConfig, model: dict) -> Weights:
    """Random weights with zeros of every kind, another number of them in each block."""
    weights = random_weights(data, model | {"pattern": PATTERN})
    state = {name: tensor.clone() for name, tensor in weights.state.items()}
    gated = model["feed_forward"].get("activation") == "swiglu"
    for index, dead in ((3, [0, 5, 7, 40]), (5, [1, 2, 3, 30, 31])):
        width = model["feed_forward"]["hidden_size"]
        rows = [*dead, *(width + channel for channel in dead)] if gated else dead
        state[f"blocks.{index}.mixer.up_proj.weight"][rows] = 0
        state[f"blocks.{index}.mixer.down_proj.weight"][:, dead] = 0
    shared = model["moe"]["shared_expert_hidden_size"]
    for index in (1, 4):
        rows = [3, 9, *((shared + 3, shared + 9) if model["moe"].get("activation", "").startswith("swiglu") else ())]
        state[f"blocks.{index}.mixer.shared.up_proj.weight"][rows] = 0
        state[f"blocks.{index}.mixer.shared.down_proj.weight"][:, [3, 9]] = 0
    for index, dead in ((1, [0]), (4, [2, 3])):
        place = f"blocks.{index}.mixer."
        for name in ("experts.up", "experts.down"):
            state[place + name][dead] = 0
        state[f"{place}expert_bias"][dead] = PRUNED_BIAS
    size, queries = (
        model["attention"]["head_dim"],
        model["attention"]["num_heads"] // model["attention"]["num_kv_heads"],
    )
    attention = "blocks.2.mixer."
    for name, width in (("q", size * queries), ("k", size), ("v", size)):
        state[f"{attention}{name}_proj.weight"][:width] = 0
    if "gate" in model["attention"]:
        state[f"{attention}g_proj.weight"][:queries] = 0
    state[f"{attention}o_proj.weight"][:, : size * queries] = 0
    return replace(weights, state=state)


def check_sizes(given: Weights, shrunk: Weights, channels: int, experts: int) -> None:
    assert shrunk.model.feed_forward.hidden_size == channels
    assert shrunk.model.moe.num_experts == experts
    assert shrunk.model.moe.shared_expert_hidden_size == given.model.moe.shared_expert_hidden_size - 2
    assert (shrunk.model.attention.num_heads, shrunk.model.attention.num_kv_heads) == (2, 1)
    assert shrunk.state["blocks.1.mixer.router.weight"].shape[0] == experts
    tokens_BT = torch.randint(448, (2, 50), generator=torch.Generator().manual_seed(0))
    assert logit_difference(given, shrunk, tokens_BT) <= RELATIVE_TOLERANCE


def test_zeros_of_every_kind_leave_and_the_logits_stay(data: DataConfig, tmp_path: Path, capsys) -> None:
    given = pruned_weights(data, MODEL)
    (tmp_path / "pruned").mkdir()
    write_weights(tmp_path / "pruned", given)
    assert run_cli(["compact", str(tmp_path / "pruned"), str(tmp_path / "small"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["max_logit_difference"] <= RELATIVE_TOLERANCE
    assert report["parameters"][1] < report["parameters"][0]
    assert report["groups"]["blocks.3.mixer.channels"] == [48, 44]
    check_sizes(given, read_weights(tmp_path / "small"), 44, 3)
    assert export_checkpoint(tmp_path / "small", tmp_path / "out", verify=False).class_name == "NemotronHForCausalLM"
    assert (tmp_path / "small" / "model.yaml").is_file()
    assert run_cli(["compact", str(tmp_path / "small"), str(tmp_path / "again")]) == 2
    assert "no channels, experts or heads of zeros" in capsys.readouterr().err


@pytest.mark.slow
def test_the_export_of_a_shrunk_model_is_proved(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    write_weights(tmp_path / "small", shrink_weights(pruned_weights(data, MODEL)).weights)
    exported = export_checkpoint(tmp_path / "small", tmp_path / "out")
    assert exported.max_logit_difference is not None and exported.max_logit_difference <= LOGIT_TOLERANCE


def test_gated_blocks_shrink_too(data: DataConfig) -> None:
    model = OWN | {"moe": OWN["moe"] | {"num_router_groups": 1, "router_group_top_k": 1, "group_score_top_k": 2}}
    model = model | {"feed_forward": {"hidden_size": 48, "activation": "swiglu"}}
    given = pruned_weights(data, model)
    check_sizes(given, shrink_weights(given).weights, 44, 5)


def test_a_zero_expert_that_the_router_may_choose_stays(data: DataConfig) -> None:
    given = pruned_weights(data, MODEL)
    state = {name: tensor.clone() for name, tensor in given.state.items()}
    state["blocks.1.mixer.expert_bias"].zero_()
    assert shrink_weights(replace(given, state=state)).weights.model.moe.num_experts == 4


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_block_keeps_one_group_at_least(data: DataConfig, share: float) -> None:
    given = random_weights(data, MODEL)
    state = {name: tensor.clone() for name, tensor in given.state.items()}
    state["blocks.3.mixer.up_proj.weight"] *= share
    state["blocks.3.mixer.down_proj.weight"] *= share
    if share:
        with pytest.raises(ValueError, match="no channels, experts or heads of zeros"):
            shrink_weights(replace(given, state=state))
    else:
        assert shrink_weights(replace(given, state=state)).weights.model.feed_forward.hidden_size == 1
