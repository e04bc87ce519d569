"""Recipes hang on the weights that pattern and settings name, and on no others; without a recipe nothing changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from amfm.kernels.low_precision.recipe import recipe_of
from amfm.model.config.kinds import all_kinds
from amfm.model.config.low_precision import LowPrecisionConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.low_precision import attach_recipes, describe_indices, list_matrices, precision_table
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.config.file import load_config
from tests.model.mixers.samples import mixer_config
from tests.pretrain.tiny_run import MODEL

ROOT = Path(__file__).parents[2]
CONFIG = ModelConfig.model_validate(MODEL | {"pattern": "ME*-ME/*E"})


def build(settings: LowPrecisionConfig) -> HybridModel:
    model = HybridModel(CONFIG, single_rank_groups(), seed=3)
    attach_recipes(model, settings)
    return model


def recipes(settings: LowPrecisionConfig) -> dict[str, str]:
    found = {name: recipe_of(weight) for name, weight in build(settings).named_parameters()}
    return {name: recipe.name for name, recipe in found.items() if recipe is not None}


def test_attention_router_ends_and_prediction_depths_stay_wide():
    found = recipes(LowPrecisionConfig(recipe="fp8_block"))
    assert set(found.values()) == {"fp8_block"}
    experts = ["experts.up", "experts.down", "shared.up_proj.weight", "shared.down_proj.weight"]
    assert set(found) == {
        *(f"blocks.{block}.mixer.{name}_proj.weight" for block in (0, 4) for name in ("in", "out")),
        *(f"blocks.{block}.mixer.{name}" for block in (1, 5) for name in experts),
        *(f"blocks.3.mixer.{name}_proj.weight" for name in ("up", "down")),
    }
    assert "blocks.2.mixer.q_proj.weight" in recipes(LowPrecisionConfig(recipe="fp8_block", block_types="*"))


def test_wide_ends_and_output_projections_follow_their_settings():
    found = recipes(LowPrecisionConfig(recipe="nvfp4", bf16_first_layers=1, bf16_last_layers=0.15))
    assert found["blocks.4.mixer.out_proj.weight"] == "mxfp8", "what NVFP4 does on its own"
    assert found["blocks.4.mixer.in_proj.weight"] == "nvfp4"
    assert {name.split(".")[1] for name in found} == {"1", "3", "4"}, "the first block and 15% of six stay wide"
    same = recipes(LowPrecisionConfig(recipe="nvfp4", out_proj_recipe="same"))
    wide = recipes(LowPrecisionConfig(recipe="nvfp4", out_proj_recipe="bf16"))
    assert same["blocks.0.mixer.out_proj.weight"] == "nvfp4"
    assert "blocks.0.mixer.out_proj.weight" not in wide


def test_random_rounding_has_a_seed_of_seed_and_name_whatever_the_pieces():
    settings = LowPrecisionConfig(recipe="nvfp4", emulate=True, weight_gradient="bf16")
    weights = dict(build(settings).named_parameters())
    first, other = (recipe_of(weights[f"blocks.{block}.mixer.in_proj.weight"]) for block in (0, 4))
    assert first is not None and other is not None
    assert first.emulate and first.weight_gradient == "bf16"
    assert first.seed != other.seed
    again = recipe_of(dict(build(settings).named_parameters())["blocks.0.mixer.in_proj.weight"])
    assert again == first


@pytest.mark.parametrize(
    "name", [name for name, kind in all_kinds().items() if not kind.is_core and kind.products.inner]
)
def test_the_table_of_kinds_names_weights_that_its_mixer_has(name):
    config = mixer_config(name)
    (letter,) = {symbol for symbol in config.letters if all_kinds()[name].symbol == symbol}
    inner, out = all_kinds()[name].products
    assert {*inner, *([] if out is None else [out])} <= {matrix.name for matrix in list_matrices(config, letter)}


def test_the_release_of_nemotron_3_super_is_a_line_of_settings():
    config = load_config(ROOT / "configs/nemotron3_super_120b.yaml")
    rows = precision_table(config.model, LowPrecisionConfig(recipe="nvfp4", bf16_last_layers=0.15), "bf16")
    by_weight = {(row.kind, row.weight, row.precision): row.blocks for row in rows}
    assert len(by_weight["M", "in_proj.weight", "nvfp4"]) == 34
    assert len(by_weight["M", "out_proj.weight", "mxfp8"]) == 34
    assert len(by_weight["E", "experts.up", "nvfp4"]) == 33
    assert by_weight["E", "latent_up.weight", "bf16"][-1] == 89, "latent projections, and the module of MTP layers"
    assert ("*", "q_proj.weight", "nvfp4") not in by_weight
    assert describe_indices((0, 1, 2, 5, 7, 8)) == "0-2, 5, 7-8"


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operations_and_gradients(model):
    tokens_BT = torch.arange(2 * 24).reshape(2, 24) % CONFIG.vocab_size
    with Operations() as seen:
        output = model(tokens_BT, PackMeta.one_document_a_row(2, 24), tokens_BT)
        output.loss.total.backward()
    return seen.names, [weight.grad for weight in model.parameters() if weight.grad is not None]


def test_without_a_recipe_every_operation_and_every_bit_is_as_before():
    names, gradients = operations_and_gradients(build(LowPrecisionConfig()))
    plain_names, plain = operations_and_gradients(HybridModel(CONFIG, single_rank_groups(), seed=3))
    assert names == plain_names
    assert all(torch.equal(one, other) for one, other in zip(gradients, plain, strict=True))
    narrow = operations_and_gradients(build(LowPrecisionConfig(recipe="fp8_block", emulate=True)))[0]
    assert len(narrow) > len(names), "the claim above can fail"
