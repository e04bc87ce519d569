"""Distillation: the loss of a run is a plain loop's, resumed bitwise, the same on every layout; what cannot be is rejected."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.hooks.distill import Distill
from amfm.pretrain.inference.weights import read_weights
from amfm.pretrain.micro_batch import MicroBatch
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.step import train_step
from amfm.pretrain.train import train
from tests.helpers.numbers import assert_bitwise
from tests.helpers.spawn import run_ranks
from tests.pretrain.distillation.teachers import SURE, distilling
from tests.pretrain.tiny_run import read_events, read_metrics, tiny_config

# An epsilon this large does not blow up rounding.
CALM = {"optimizer__epsilon": 1e-3, "train__micro_batch_size": 1}


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_a_step_has_the_gradients_of_a_plain_loop(
    data: DataConfig, tmp_path: Path, teacher: str, weight: float
) -> None:
    """Of (1 - w) cross entropy + w divergence over the valid tokens of all micro-batches, by autograd of whole logits."""
    config = distilling(data, tmp_path, teacher, {"weight": weight, "temperature": 1.5}, **CALM)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"pattern": "M*-"})}
    )  # no balance losses
    with SignalWatch() as signals:
        run = start_run(config, signals)
    batches = run.loader.take(4, 1)
    run.loader.seek(0)
    result = train_step(run)
    (hook,) = (hook for hook in run.hooks if isinstance(hook, Distill))
    hook.after_step(result)
    close_run(run)

    ours = HybridModel(config.model, single_rank_groups(), seed=config.train.seed)
    theirs = read_weights(teacher).build()
    tokens, divergence = sum(int(batch.loss_mask_BT.sum()) for batch in batches), torch.zeros(())
    for batch in batches:
        given = MicroBatch.from_batch(batch, 0, 1)
        logits, wanted = (model(given.tokens_BT, given.meta).logits_BTV.flatten(0, 1) for model in (ours, theirs))
        labels = given.labels_BT.flatten()
        log_q, log_p = ((each / 1.5).log_softmax(-1) for each in (logits, wanted.detach()))
        own = 1.5**2 * (log_p.exp() * (log_p - log_q)).sum(-1)[labels != -100].sum()
        nll = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        (((1 - weight) * nll + weight * own) / tokens).backward()
        divergence += own.detach() / tokens
    norm = torch.stack([value.grad.norm() for value in ours.parameters()]).norm()
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert result.found["divergence"] == pytest.approx(float(divergence), rel=1e-5)


def test_a_resume_continues_to_the_bit_and_logs_the_divergence(data: DataConfig, tmp_path: Path, teacher: str) -> None:
    for folder, stops in (("straight", [None]), ("resumed", [1, None])):
        for stop in stops:
            assert (
                train(distilling(data, tmp_path / folder, teacher, train__steps=3, train__stop_after_steps=stop)) == 0
            )
    straight, resumed = (read_metrics(tmp_path / name) for name in ("straight", "resumed"))
    assert [line["loss"] for line in straight] == [line["loss"] for line in resumed]
    assert [line["divergence"] for line in straight] == [line["divergence"] for line in resumed]
    assert all(line["divergence"] > 0 and line["auxiliary"]["distill"] < 0 for line in straight)
    ends = [read_weights(tmp_path / name).state for name in ("straight", "resumed")]
    for name in ends[0]:
        assert_bitwise(ends[0][name], ends[1][name], name)
    assert "step 12" in read_events(tmp_path / "straight", "distill")[0]["teacher"]


def test_a_run_that_teaches_stays_at_the_step_that_was_found_first(
    data: DataConfig, tmp_path: Path, teacher: str
) -> None:
    lent = tmp_path / "teacher/checkpoints"
    shutil.copytree(Path(teacher) / "checkpoints/step-00000006", lent / "step-00000006")

    def train_to(step: int) -> int:
        return train(distilling(data, tmp_path / "run", str(lent.parent), train__stop_after_steps=step))

    assert train_to(1) == 0
    shutil.copytree(Path(teacher) / "checkpoints/step-00000012", lent / "step-00000012")
    assert train_to(2) == 0
    assert ["step 6" in event["teacher"] for event in read_events(tmp_path / "run", "distill")] == [True, True]


def test_a_micro_batch_that_is_examined_counts_once(data: DataConfig, tmp_path: Path, teacher: str) -> None:
    for name, every in (("plain", None), ("examined", 1)):
        config = distilling(
            data, tmp_path / name, teacher, train__stop_after_steps=1, health__check_state_every_steps=every
        )
        assert train(config) == 0
    plain, examined = (read_metrics(tmp_path / name)[0] for name in ("plain", "examined"))
    assert plain["divergence"] == examined["divergence"]


LAYOUTS: list[dict[str, Any]] = [
    {"parallel__zero_stage": 0},
    {"parallel__zero_stage": 2},
    {"parallel__zero_stage": 3},
    {"parallel__tensor": 2, "parallel__sequence_parallel": True},
    {"parallel__tensor": 2, "parallel__zero_stage": 2},
    {"parallel__expert": 2, "parallel__zero_stage": 2},
    {"parallel__context": 2},
]


def train_layouts(data: DataConfig, root: str, teacher: str, layouts: list[dict[str, Any]]) -> None:
    for number, layout in enumerate(layouts):
        assert train(distilling(data, Path(root, str(number)), teacher, **CALM, **layout)) == 0


@pytest.mark.slow
def test_every_layout_learns_what_one_rank_does(data: DataConfig, tmp_path: Path, teacher: str) -> None:
    whole = str(tmp_path / "whole")  # a teacher with experts, which expert ranks have in parts
    assert train(tiny_config(data, Path(whole), **SURE)) == 0
    for name, of in (("narrow", teacher), ("experts", whole)):
        run_ranks(train_layouts, data, str(tmp_path / name / "one"), of, [{}], num_ranks=1)
        run_ranks(train_layouts, data, str(tmp_path / name / "two"), of, LAYOUTS)
        expected, wanted = read_metrics(tmp_path / name / "one/0"), read_weights(tmp_path / name / "one/0").state
        for number, layout in enumerate(LAYOUTS):
            found = read_metrics(tmp_path / name / f"two/{number}")
            assert all(line["divergence"] > 0.05 for line in found)
            for key in ("loss", "divergence", "grad_norm"):
                assert [line[key] for line in found] == pytest.approx([line[key] for line in expected], rel=1e-4), (
                    layout
                )
            state = read_weights(tmp_path / name / f"two/{number}").state
            for each in wanted:
                torch.testing.assert_close(state[each], wanted[each], rtol=0, atol=2e-5, msg=f"{layout}: {each}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel__pipeline": 2}, r"distill.teacher = .* with parallel.pipeline above 1 no rank"),
        ({"parallel__expert": 2, "parallel__expert_buffer_factor": 2.0}, "remove parallel.expert_buffer_factor"),
    ],
)
def test_layouts_that_a_teacher_does_not_know_are_refused(
    data: DataConfig, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_run(distilling(data, tmp_path, "teacher", **changes), 2)


def test_more_tokens_than_there_are_is_refused(data: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"distill.top_k = 448: must be below model.vocab_size=448"):
        check_run(distilling(data, tmp_path, "teacher", {"top_k": 448}), 1)


def test_a_teacher_of_other_tokens_is_refused(data: DataConfig, tmp_path: Path, teacher: str) -> None:
    other = distilling(data, tmp_path / "run", teacher).model_dump(mode="json")
    other["model"]["vocab_size"] = 512
    with pytest.raises(ValueError, match=r"has vocab_size 448, and model.vocab_size=512"):
        train(RunConfig.model_validate(other))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    with pytest.raises(ValueError, match="is not a checkpoint, run directory or imported model"):
        train(distilling(data, tmp_path / "run", str(tmp_path)))
