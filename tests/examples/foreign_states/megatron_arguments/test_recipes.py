"""Recipes of Megatron-Bridge: translated, they are the published models, can be planned, and scaled down they train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from amfm_foreign_states.megatron_arguments.sources import read_arguments
from amfm_foreign_states.megatron_arguments.translation import translate
from amfm_foreign_states.megatron_arguments.write import write_yaml

from amfm.launch.api import plan
from amfm.model.flops import count_parameters
from amfm.pretrain.config.file import load_config
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.train import train
from tests.examples.foreign_states.megatron_arguments.test_translation import SMALL, scaled
from tests.pretrain.tiny_run import tiny_data

RECIPES = Path(__file__).with_name("recipes")
# Billions of parameters as published, and a number of GPUs that the ranks of the recipe divide.
PUBLISHED = {
    "nemotron_3_nano": (31.6, 16),
    "nemotron_3_super": (120.7, 128),
    "nemotron_3_ultra": (550.0, 1536),
    "qwen3_next": (79.7, 32),
    "kimi_k2": (1027.0, 1024),
}


def recipe(name: str) -> dict[str, dict[str, Any]]:
    common, own = (yaml.safe_load((RECIPES / f"{each}.yaml").read_text()) for each in ("common", name))
    return common | {key: {**common.get(key, {}), **fields} for key, fields in own.items()}


def translated(fields: dict[str, Any], folder: Path) -> RunConfig:
    (folder / "run_config.yaml").write_text(yaml.safe_dump(fields))
    out = folder / "translated.yaml"
    out.write_text(write_yaml(translate(read_arguments(folder / "run_config.yaml"))))
    return load_config(out)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_becomes_the_published_model(name: str, tmp_path: Path) -> None:
    config = translated(recipe(name), tmp_path)
    published = PUBLISHED[name][0]
    # The published numbers leave out layers of multi-token prediction.
    assert count_parameters(config.model.without_depths()).total / 1e9 == pytest.approx(published, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_can_be_planned_on_h100(name: str, tmp_path: Path) -> None:
    fields = recipe(name)
    # The common 32 of Qwen3-Next's recipe does not fill its pipeline here, with two sequences per micro-batch.
    fields["train"]["global_batch_size"] = max(64, fields["train"]["global_batch_size"])
    found = plan(translated(fields, tmp_path), gpus=PUBLISHED[name][1], gpu="h100")
    assert found.is_own and found.seconds() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_scaled_down_trains_four_steps(name: str, tmp_path: Path) -> None:
    fields = recipe(name)
    model = fields["model"]
    model |= {key: value for key, value in SMALL.items() if key in model}
    if "hybrid_layer_pattern" in model:
        model |= {"hybrid_layer_pattern": "MEM*E", "num_layers": 5}
    else:
        model |= {"num_layers": 4} | ({"moe_layer_freq": [0, 1, 1, 1]} if "moe_layer_freq" in model else {})
    fields["train"] |= {"train_iters": 4, "global_batch_size": 4, "micro_batch_size": 2}
    fields["scheduler"] |= {"lr_warmup_iters": 1, "lr_decay_iters": 4, "lr_wsd_decay_iters": 2}
    fields["dataset"] |= {"seq_length": 48}
    config = scaled(translated(fields, tmp_path), tiny_data(tmp_path / "data"), tmp_path / "run")
    assert train(config) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line][-1] == 4
