"""Maps of weights: every one, there and back, and what is missing or foreign."""

from __future__ import annotations

import pytest
import torch

from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.classes import weight_map
from amfm.model.on_demand import on_demand
from amfm.model.shapes import weight_shapes
from tests.model.huggingface.cases import NEMOTRON_H, TARGETED, build_ours, nemotron_h_config


@pytest.mark.parametrize(("target", "config"), TARGETED.values(), ids=TARGETED.keys())
def test_streamed_pieces_put_together_are_the_whole_conversion(
    monkeypatch: pytest.MonkeyPatch, target: str, config: ModelConfig
) -> None:
    monkeypatch.setattr("amfm.model.on_demand.BLOCK_NUMEL", 96)  # a few rows
    ours = on_demand(build_ours(config).state_dict())
    mapping = weight_map(config, target)
    expected = mapping.to_theirs(ours)
    assert mapping.their_shapes({name: ours.shape(name) for name in ours}) == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }
    streamed = {name: torch.full_like(tensor, float("nan")) for name, tensor in expected.items()}
    largest = {"whole": 0, "piece": 0}
    for name, first_row, rows in mapping.stream_theirs(ours):
        assert streamed[name][first_row : first_row + len(rows)].isnan().all(), f"{name} came twice"
        streamed[name][first_row : first_row + len(rows)] = rows
        if "in_proj_qkvz" not in name:  # heads stand apart in ours: it comes whole
            largest = {
                "whole": max(largest["whole"], expected[name].numel()),
                "piece": max(largest["piece"], rows.numel()),
            }
    assert all(torch.equal(streamed[name], tensor) for name, tensor in expected.items())
    assert largest["piece"] < largest["whole"]
    back = mapping.to_ours(expected)
    for name in ours:
        rows = torch.cat([rows.reshape(-1) for _, rows in back.blocks(name)])
        assert torch.equal(rows, back[name].reshape(-1)), name


@pytest.mark.parametrize(("target", "config"), TARGETED.values(), ids=TARGETED.keys())
def test_maps_cover_every_weight_and_go_back_without_change(target: str, config: ModelConfig) -> None:
    ours = build_ours(config).state_dict()
    assert weight_shapes(config) == {name: tuple(tensor.shape) for name, tensor in ours.items()}
    mapping = weight_map(config, target)
    back = mapping.to_ours(mapping.to_theirs(ours))
    assert back.keys() == ours.keys()
    for name, tensor in ours.items():
        if target.startswith("qwen3") and name.endswith("norm.weight"):
            # Norms of the class are 1 + w: what is below 0.5 is rounded.
            assert float((back[name] - tensor).abs().max()) <= 2**-24
            tensor = torch.where(tensor < 0.5, back[name], tensor)
        assert torch.equal(back[name], tensor), name


def test_missing_and_foreign_tensors_are_named() -> None:
    mapping = weight_map(NEMOTRON_H, "nemotron_h")
    theirs = mapping.to_theirs(build_ours(NEMOTRON_H).state_dict())
    del theirs["lm_head.weight"]
    theirs["stray"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"missing \['lm_head.weight'\], unknown \['stray'\]"):
        mapping.to_ours(theirs)


def test_a_tied_head_that_was_changed_is_refused() -> None:
    config = nemotron_h_config(tie_embeddings=True)
    mapping = weight_map(config, "nemotron_h")
    theirs = mapping.to_theirs(build_ours(config).state_dict())
    assert torch.equal(theirs["lm_head.weight"], theirs["backbone.embeddings.weight"])
    theirs["lm_head.weight"] = theirs["lm_head.weight"] + 1
    with pytest.raises(ValueError, match="no longer tied"):
        mapping.to_ours(theirs)
