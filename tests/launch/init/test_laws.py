"""One dial: shapes of a depth are those of the presets, and tokens, batch and rate follow by laws that say their range."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from amfm.launch.cli import run
from amfm.launch.init.laws import BATCH, HIGHEST_RATE, RATE, TOKENS, recipe_of
from amfm.launch.init.shapes import SIZES, STYLES, dial_size, model_section
from amfm.model.config.checks import check_model
from amfm.model.config.schema import ModelConfig
from amfm.model.flops import count_parameters
from amfm.pretrain.checks.load import load_checked


def test_the_shape_at_the_width_of_a_preset_is_the_preset_s() -> None:
    preset = SIZES["20m"]
    made = dial_size(6, 256, preset.vocab_size)
    assert made.pattern.split() == ["ME", "ME", "ME", "*E", "ME", "ME"]
    assert (made.mamba, made.experts) == (preset.mamba, preset.experts)
    assert dial_size(5).pattern.split() == ["ME", "ME", "*E", "ME", "ME"]


@pytest.mark.parametrize(("depth", "style"), itertools.product((2, 3, 7, 12), STYLES))
def test_every_depth_makes_a_model_in_every_style(depth: int, style: str) -> None:
    model = ModelConfig.model_validate(model_section("dial", style, dial_size(depth)))
    check_model(model)
    assert len(model.letters) == 2 * depth and model.hidden_size == 32 * depth
    assert any(letter in "*A" for letter in model.letters)


def test_parameters_grow_with_the_cube_of_the_depth() -> None:
    small, large = (recipe_of(depth, "nemotron").body for depth in (12, 24))
    assert large / small == pytest.approx(8, rel=0.05)


def test_tokens_batch_and_rate_are_those_of_the_laws() -> None:
    recipe = recipe_of(24, "nemotron")
    size = recipe.size
    counts = count_parameters(ModelConfig.model_validate(model_section("d24", "nemotron", size)))
    assert recipe.active == counts.active and recipe.tokens == 20 * counts.active
    assert recipe.body == counts.active - 2 * size.vocab_size * size.hidden_size
    batch = size.global_batch_size * size.sequence_length
    assert size.steps * batch == pytest.approx(recipe.tokens, rel=1e-3)
    assert 2**-0.5 <= batch / (0.58 * recipe.tokens**0.571) <= 2**0.5, "to a power of two"
    assert size.learning_rate == pytest.approx(1.79 * recipe.body**-0.713 * recipe.tokens**0.307, rel=0.03)
    assert not recipe.warnings


def test_what_is_out_of_range_is_named_and_no_rate_is_above_one_that_was_measured() -> None:
    recipe = recipe_of(2, "nemotron", vocab_size=1024)
    assert recipe.size.learning_rate == HIGHEST_RATE < RATE(recipe.body, recipe.tokens)
    assert [text.split(":")[0] for text in recipe.warnings[:2]] == ["tokens", "batch"]
    assert "is outside of 6e+07 to 1e+09, where it was measured" in " ".join(recipe.warnings)
    # A range has its ends.
    assert not [*TOKENS.warnings(7e7, 1), *BATCH.warnings(1, 2e9), *RATE.warnings(1e9, 1e11)]
    narrow = replace(RATE, n_range=(1, 2))
    assert len(list(narrow.warnings(3, 1e10))) == 1


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text(json.dumps({"text": "some words of a text " * 40}) + "\n")
    with path.open("a") as file:
        file.writelines([json.dumps({"text": "some words of a text " * 40}) + "\n"] * 999)
    return path


def test_a_depth_makes_a_configuration_that_passes(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--style", "nemotron", "--data", str(text), "--hardware", "1xh100", "--json"]
    assert run(["init", str(tmp_path / "run"), "--depth", "3", *flags]) == 0
    said = json.loads(capsys.readouterr().out)
    config = load_checked(said["config"], world_size=1)
    size = recipe_of(3, "nemotron", 1_024).size
    assert (config.train.steps, config.train.global_batch_size) == (size.steps, size.global_batch_size)
    assert config.optimizer.learning_rate == size.learning_rate and config.model.hidden_size == 96
    assert said["warnings"] == list(recipe_of(3, "nemotron", 1_024).warnings)
    head = " ".join(Path(said["config"]).read_text().split("\n\n")[0].replace("#", "").split())
    assert "arXiv 2503.04715" in head and "Warning: batch: D" in head and re.search(r"depth 3 in the style", head)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--depth", "1"], "--depth 1 must be from 2 to 64 layers"),
        (["--depth", "65"], "--depth 65 must be from 2 to 64 layers"),
        (["--depth", "4", "--size", "3m"], "--depth 4 and --size 3m both set how large the model is"),
    ],
)
def test_what_is_no_depth_is_refused(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["init", str(tmp_path / "run"), *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
