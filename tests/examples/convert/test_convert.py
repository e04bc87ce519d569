"""A conversion end to end: what is trained and what is not, resumes, the result and its measurements, and rejections."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from amfm_convert.measure import ConversionReport, judge, measure_conversion, write_result
from amfm_convert.rules import check_conversion
from amfm_convert.stages import ConversionStage, conversion_stages, converted_model
from amfm_convert.weights import StartReport, stage_weights, write_start

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.samples.samples import NO_TOKENIZER
from amfm.model.packing import PackMeta
from amfm.pretrain.checkpoint.inspect import diff_checkpoints, find_checkpoint, read_full_state
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.inference.weights import read_weights, require_same_function
from amfm.pretrain.train import train
from tests.examples.convert.conversions import MODEL, WINDOW_LINEAR, conversion, run_conversion, train_teacher


@dataclass(frozen=True)
class Done:
    """A finished conversion."""

    config: RunConfig
    start: StartReport
    stages: dict[str, ConversionStage]
    found: ConversionReport


@pytest.fixture(scope="module")
def done(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    folder = tmp_path_factory.mktemp("conversion")
    config = conversion(data, folder, train_teacher(data, folder))
    check_conversion(config, 1)
    start, stages = run_conversion(config)
    found, tuned = measure_conversion(config, stages, start)
    write_result(found, tuned, list(stages.values()))
    yield Done(config, start, stages, found)


def test_the_chosen_blocks_take_the_teachers_weights(done: Done) -> None:
    assert converted_model(done.config).pattern == "{window_linear}-*-"
    teacher, start = (read_weights(path) for path in (done.config.convert.teacher, done.stages["transfer"].initial))
    assert all(torch.equal(start.state[name], tensor) for name, tensor in teacher.state.items())
    assert {name.rsplit(".", 1)[-1] for name in done.start.new} >= {"query_features", "key_features", "window_weight"}
    assert not done.start.left


def test_a_transfer_moves_the_new_weights_alone(done: Done) -> None:
    before, after = read_weights(done.stages["transfer"].initial).state, stage_weights(done.stages["transfer"]).state
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(done.start.new)
    lines = [json.loads(line) for line in (done.stages["transfer"].run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(line["auxiliary"]["transfer"] > 0 for line in lines)
    # What a run trains on while its blocks learn apart is the teacher's stream.
    assert lines[0]["loss"] == pytest.approx(_first_loss(done.stages["tune-teacher"].run_dir), rel=1e-5)


def test_tuning_moves_updates_and_new_weights_and_leaves_the_rest_to_the_bit(done: Done) -> None:
    held = read_full_state(find_checkpoint(done.stages["tune"].run_dir))
    first = read_weights(done.stages["tune"].initial).state
    updated = {name.removesuffix(".lora.up") for name in held if name.endswith(".lora.up")}
    assert updated == {f"blocks.{block}.mixer.{name}_proj" for block in (0, 2) for name in "qkvo"}
    for name, tensor in first.items():
        assert torch.equal(held[name], tensor) == (name not in done.start.new), name
    merged = stage_weights(done.stages["tune"]).state
    for layer in updated:
        change = merged[f"{layer}.weight"] - first[f"{layer}.weight"]
        assert 0 < torch.linalg.matrix_rank(change.double(), rtol=1e-4) <= 2, layer


def test_the_result_is_a_model_like_any_other(done: Done) -> None:
    weights = read_weights(done.found.result)
    assert weights.model.pattern == "{window_linear}-*-"
    run = read_weights(done.stages["tune"].run_dir)
    assert all(torch.allclose(run.state[name], tensor, atol=1e-6) for name, tensor in weights.state.items())
    assert weights.build()(torch.tensor([[1, 2, 3]]), PackMeta.one_document_a_row(1, 3)).logits_BTV.isfinite().all()
    with pytest.raises(ValueError, match="is a control of a conversion"):
        read_weights(done.stages["tune-window"].run_dir)


def _first_loss(run_dir: Path) -> float:
    return float(json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])["loss"])


def test_the_report_has_every_control_and_says_what_the_branch_is_worth(done: Done) -> None:
    report = json.loads((done.found.result / "conversion.json").read_text())
    assert list(report["loss_nats_a_token"]) == [
        "teacher",
        "teacher, tuned alike",
        "converted at once",
        "transferred",
        "tuned",
        "window alone, tuned alike",
        "tuned, without linear branch",
        "tuned, without window",
    ]
    assert set(report["linear_share_by_block"]) == {"0"} and 0 < report["linear_share_by_block"]["0"] < 1
    assert "linear branch" in report["verdict"]
    assert report["converted_blocks"] == [0]
    assert (done.found.result / "conversion.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("name", [pytest.param("transfer", marks=pytest.mark.slow), "tune"])
def test_a_stage_resumes_bit_for_bit(done: Done, tmp_path: Path, name: str) -> None:
    config = done.stages[name].config
    again = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(tmp_path / name)})})
    half = again.model_copy(update={"train": again.train.model_copy(update={"stop_after_steps": 2})})
    assert train(half) == 0
    # Its own checkpoint has all: the weights that it began with are gone.
    gone = again.model_copy(update={"run": again.run.model_copy(update={"initial_weights": str(tmp_path / "gone")})})
    assert train(gone) == 0
    whole, resumed = (find_checkpoint(Path(run)) for run in (config.run.dir, again.run.dir))
    difference = diff_checkpoints(whole, resumed)
    assert not difference["tensors"] and not difference["only_in_first"] and not difference["only_in_second"]


def test_another_mixer_takes_what_fits_and_the_rest_is_named(data: DataConfig, done: Done, tmp_path: Path) -> None:
    config = conversion(
        data,
        tmp_path,
        Path(done.config.convert.teacher),
        model__mixers={"gla": {"num_heads": 4, "head_dim": 8, "chunk_size": 16}},
        convert__to="gla",
        convert__transfer=None,
    )
    check_conversion(config, 1)
    start = write_start(config)
    assert start.left == ("blocks.0.mixer.k_proj.weight", "blocks.0.mixer.v_proj.weight")  # of two key heads
    teacher, first = read_weights(config.convert.teacher).state, read_weights(tmp_path / "conversion" / "start").state
    assert torch.equal(first["blocks.0.mixer.in_proj.weight"][:32], teacher["blocks.0.mixer.q_proj.weight"])
    assert torch.equal(first["blocks.0.mixer.out_proj.weight"], teacher["blocks.0.mixer.o_proj.weight"])
    stages = list(conversion_stages(config))
    assert [stage.name for stage in stages] == ["tune", "tune-teacher"]


def test_the_verdict_says_when_the_linear_branch_is_unused() -> None:
    losses = {"teacher, tuned alike": 1.846, "tuned": 1.859, "window alone, tuned alike": 1.866}
    assert judge(losses | {"tuned, without linear branch": 1.8595}).startswith("linear branch unused: leaving it out")
    bypassed = judge(losses | {"tuned, without linear branch": 1.9, "window alone, tuned alike": 1.854})
    assert bypassed.startswith("linear branch unused: a model with only window attention")
    used = judge(losses | {"tuned": 1.884, "tuned, without linear branch": 2.136, "window alone, tuned alike": 2.003})
    assert used.startswith("linear branch used: leaving it out costs +0.2520 nats")
    assert "closes 76% of its gap" in used


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"convert": None}, "convert: is missing"),
        ({"convert__stage": "tune"}, "convert.stage = tune: names a stage's own run"),
        ({"convert__blocks": [1], "convert__keep_blocks": []}, "convert.blocks = 1: is - "),
        ({"convert__keep_blocks": [7]}, "convert.keep_blocks = 7: must be below 4"),
        ({"convert__keep_blocks": [0, 2]}, r"convert.keep_blocks = \(0, 2\): keeps every attention block"),
        ({"convert__blocks": [0]}, "convert.keep_blocks: is given together with convert.blocks"),
        ({"convert__to": "gla"}, "model.mixers.gla: is missing"),
        ({"convert__to": "mamba7"}, "convert.to = mamba7: is not a registered mixer"),
        ({"train__steps": 4}, "train.steps = 4: has no effect in a conversion"),
        ({"data__validation_fraction": 0}, "data.validation_fraction = 0: leaves nothing to measure"),
        (
            {"data__synthetic": {"task": "parity"}},
            "data.synthetic = parity: is a synthetic task, and a conversion measures text",
        ),
        ({"parallel__zero_stage": 3}, "parallel.zero_stage = 3: cuts frozen weights"),
        ({"optimizer__kind": "muon"}, "optimizer.kind = muon: makes the steps of matrices orthogonal"),
        ({"forget": {"every_steps": 1, "until_step": 2}}, "forget: changes weights that stay as they are"),
        (
            {"model__mixers": {"window_linear": WINDOW_LINEAR | {"num_heads": 2}}},
            "model.mixers.window_linear.num_heads = 2: must be 4, as model.attention has it",
        ),
        (
            {"model__mixers": {"window_linear": WINDOW_LINEAR | {"positions": "none"}}},
            "positions = none: must be rope",
        ),
        (
            {"model__mixers": {"window_linear": WINDOW_LINEAR | {"preset": "liger"}}},
            "convert.transfer: has nothing to train: preset=liger",
        ),
        ({"model__attention": MODEL["attention"] | {"bias": True}}, "model.attention.bias = true: adds biases"),
        ({"model__pattern": "--", "convert__keep_blocks": []}, "has no softmax attention"),
        (
            {"model__attention_residuals": {"blocks_per_source": 1}},
            "model.attention_residuals: is a residual stream that no conversion was tried on",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused_before_it_starts(
    data: DataConfig, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_conversion(conversion(data, tmp_path, tmp_path / "teacher", **changes), 1)
    assert not (tmp_path / "conversion").exists()


def test_a_training_run_refuses_the_section(data: DataConfig, tmp_path: Path) -> None:
    config = conversion(data, tmp_path, tmp_path / "teacher", train__steps=4)
    with pytest.raises(ConfigError, match="convert: is a section of `amfm convert`"):
        train(config)


def test_a_teacher_of_another_model_is_refused(data: DataConfig, done: Done, tmp_path: Path) -> None:
    other = conversion(data, tmp_path, Path(done.config.convert.teacher), model__hidden_size=64)
    with pytest.raises(ValueError, match=r"convert.teacher=.* holds another model: hidden_size: 32 there, 64 here"):
        write_start(other)
    assert MODEL["hidden_size"] == 32


def test_a_teacher_of_another_tokenizer_or_of_a_synthetic_task_is_refused(done: Done) -> None:
    teacher = read_weights(done.config.convert.teacher)
    with pytest.raises(ValueError, match=r"convert\.teacher=x was trained with tokenizer .* prepared with 0000"):
        require_same_function(teacher, done.config.model, "0000", "convert.teacher=x")
    with pytest.raises(
        ValueError, match=r"convert\.teacher=x was trained on text, and this run is on a synthetic task"
    ):
        require_same_function(teacher, done.config.model, NO_TOKENIZER, "convert.teacher=x")


def test_a_run_directory_of_another_conversion_is_refused(data: DataConfig, done: Done) -> None:
    folder = Path(done.config.run.dir).parent
    other = conversion(data, folder, Path(done.config.convert.teacher), convert__keep_blocks=[0])
    with pytest.raises(ValueError, match="holds another conversion: pattern"):
        write_start(other)
