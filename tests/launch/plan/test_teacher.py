"""A plan counts what teaches a run: weights, FLOPs, seconds, and the bytes of a store in place of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amfm.launch.plan.plan import Plan, advise, plan_as_dict
from amfm.model.flops import count_parameters, flops_per_token
from amfm.pretrain.distillation.store import StoreLayout
from tests.launch.plan.presets import plan_of, preset


def described(folder: Path, name: str) -> str:
    """A weights folder of a preset's model, as far as a plan reads it."""
    folder.mkdir()
    (folder / "weights.json").write_text(json.dumps({"model": preset(name).model.model_dump(mode="json")}))
    return str(folder)


def taught(teacher: str, *overrides: str) -> Plan:
    return plan_of("ladder_150m", f"distill.teacher={teacher}", *overrides)


def test_an_online_teacher_costs_memory_flops_and_time(tmp_path: Path) -> None:
    alone, teacher = plan_of("ladder_150m"), preset("ladder_150m").model
    found = taught(described(tmp_path / "teacher", "ladder_150m"))
    assert found.own.memory.parts["teacher"] == 2 * count_parameters(teacher).total
    assert found.own.memory.parts["comparison with the teacher"] > 6 * 4 * 2**23
    forward = sum(flops_per_token(teacher, found.stages[0].stage.train.sequence_length).values()) / 3
    assert found.flops["teacher"] == forward and sum(found.flops.values()) == sum(alone.flops.values()) + forward
    # A third of what the model itself takes, and its head once more.
    of_blocks = sum(alone.own.step.compute.values())
    assert of_blocks / 3 < found.own.step.compute["teacher"] < of_blocks
    assert found.own.step.total() > alone.own.step.total()
    assert advise(found) == ""


def test_a_store_costs_its_bytes_and_no_teacher() -> None:
    overrides = ("distill.store=teacher-says", "distill.top_k=64")
    found = taught("elsewhere", *overrides)
    assert "teacher" not in found.own.memory.parts and "teacher" not in found.flops and advise(found) == ""
    samples = found.stages[0].stage.num_samples()
    length = found.stages[0].stage.train.sequence_length
    width = 2 if found.config.model.vocab_size <= 65536 else 4
    assert found.store_bytes == samples * (4 + length * (64 * width + 65 * 2))
    assert plan_as_dict(found)["teacher_store_bytes"] == StoreLayout.of_run(found.config).num_bytes()


def test_a_teacher_that_is_not_here_is_named_and_another_folder_is_refused(tmp_path: Path) -> None:
    missing = taught(str(tmp_path / "missing"))
    assert advise(missing).startswith(f"distill.teacher={tmp_path / 'missing'} is not on this machine, so its weights")
    with pytest.raises(ValueError, match="is not a checkpoint, run directory or imported model"):
        taught(str(tmp_path))
