"""A conversion that trains in seconds: a teacher of two softmax blocks, of which one becomes window_linear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amfm_convert.stages import ConversionStage, conversion_stages
from amfm_convert.weights import StartReport, complete_stage, write_start

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.train import train
from tests.pretrain.tiny_run import tiny_config

MODEL: dict[str, Any] = {
    "pattern": "*-*-",
    "vocab_size": 448,
    "hidden_size": 32,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "positions": "rope"},
    "feed_forward": {"hidden_size": 48},
}
WINDOW_LINEAR = {"window": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "positions": "rope", "chunk_size": 16}


def train_teacher(data: DataConfig, folder: Path, **overrides: Any) -> Path:
    """Train a softmax model for some steps; its run directory."""
    tree = tiny_config(data, folder / "teacher", **{"train__steps": 3} | overrides).model_dump(mode="json") | {
        "model": MODEL
    }
    assert train(RunConfig.model_validate(tree)) == 0
    return folder / "teacher"


def conversion(data: DataConfig, folder: Path, teacher: Path, **changes: Any) -> RunConfig:
    """The configuration of its conversion; changes by dotted keys with double underscores."""
    tree = tiny_config(data, folder / "conversion").model_dump(mode="json")
    tree["model"] = MODEL | {"mixers": {"window_linear": WINDOW_LINEAR}}
    tree["train"] |= {"steps": None, "checkpoint_every_steps": 2, "checkpoint_in_background": False}
    tree["schedule"] = {"kind": "constant", "warmup_steps": 1}
    tree["convert"] = {
        "teacher": str(teacher),
        "keep_blocks": [2],
        "transfer": {"steps": 3},
        "tune": {"steps": 3, "rank": 2},
    }
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        place = tree
        for part in filter(None, section.split("__")):
            place = place[part]
        place[name] = value
    return RunConfig.model_validate(tree)


def run_conversion(config: RunConfig) -> tuple[StartReport, dict[str, ConversionStage]]:
    """Run every stage in this process."""
    start = write_start(config)
    stages = {stage.name: stage for stage in conversion_stages(config)}
    for stage in stages.values():
        assert train(stage.config) == 0
        complete_stage(stage)
    return start, stages
