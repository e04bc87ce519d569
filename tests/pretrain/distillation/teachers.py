"""A small teacher, and runs that learn from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.train import train
from tests.pretrain.tiny_run import MODEL, tiny_config

DISTILL: dict[str, Any] = {"weight": 0.7, "temperature": 1.5, "top_k": 20}
# Narrower, and without experts: a teacher may be another model.
TEACHER = MODEL | {"pattern": "M*-", "hidden_size": 24}
# So that a teacher has something to say.
SURE = {"train__steps": 12, "optimizer__learning_rate": 0.03, "train__checkpoint_every_steps": 6}


def train_teacher(data: DataConfig, run_dir: Path) -> str:
    """Train the teacher: a run with checkpoints of steps 6 and 12."""
    config = tiny_config(data, run_dir, **SURE).model_dump(mode="json")
    assert train(RunConfig.model_validate(config | {"model": TEACHER})) == 0
    return str(run_dir)


def distilling(
    data: DataConfig, run_dir: Path, teacher: str, distill: dict[str, Any] = DISTILL, **overrides: Any
) -> RunConfig:
    """A run of four steps that learns from a teacher."""
    config = tiny_config(data, run_dir, **overrides).model_dump(mode="json")
    return RunConfig.model_validate(config | {"distill": {"teacher": teacher, **distill}})
