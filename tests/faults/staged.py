"""A run of two stages in their own layouts, for the child that is recorded and the test that resumes it."""

from __future__ import annotations

from pathlib import Path

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.launcher_protocol import NEXT_LAYOUT
from amfm.pretrain.train import train
from tests.pretrain.tiny_run import tiny_config

BOUNDARY = 3  # steps of the first stage


def staged_config(data: DataConfig, run_dir: Path, **settings: int) -> RunConfig:
    """Two stages of three steps on one rank, the second with longer rows under another ZeRO stage; saves at each step."""
    stages = [
        {"name": "short", "steps": BOUNDARY},
        {"name": "long", "steps": 3, "sequence_length": 96, "parallel": {"zero_stage": 2}},
    ]
    config = tiny_config(data, run_dir, train__checkpoint_every_steps=1, train__keep_last=2, **settings)
    tree = config.model_dump(mode="json") | {"stages": stages}
    tree["train"]["steps"] = None
    tree["schedule"] = {"kind": "constant", "warmup_steps": 1}
    return RunConfig.model_validate(tree)


def run_to_the_end(config: RunConfig) -> list[int]:
    """Start the run until it is done, as its launcher does; returns the exit codes."""
    codes = [train(config)]
    while codes[-1] == NEXT_LAYOUT:
        codes.append(train(config))
    return codes
