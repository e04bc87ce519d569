"""On how many ranks a stage runs, and what is said of a layout that no number of them can use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from amfm.data_pipeline.config import DataConfig, SourceConfig
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.checks.stages import describe_parallel, ranks_of_stage
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.stages import fresh_starts, resolve_stages
from tests.pretrain.tiny_run import tiny_config

DATA = DataConfig(store="store", sources=(SourceConfig(name="text", paths=("text",)),))


def staged(*stages: dict[str, Any]) -> RunConfig:
    """A run of stages of two steps each, whose six rows suit one and three ranks."""
    config = tiny_config(DATA, Path("run"), train__global_batch_size=6, data__tokenizer={"vocab_size": 448})
    tree = config.model_dump(mode="json", exclude_unset=True)
    tree["train"].pop("steps")
    tree["schedule"] = {"kind": "constant", "warmup_steps": 0}
    named = [{"name": f"stage{number}", "steps": 2} | stage for number, stage in enumerate(stages)]
    return RunConfig.model_validate(tree | {"stages": named})


def refusal(config: RunConfig, *arguments: Any, **named: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        check_run(config, *arguments, **named)
    return str(refused.value)


def test_what_a_stage_leaves_open_of_its_layout_is_as_before_it() -> None:
    config = staged(
        {"recompute": "selective", "recompute_blocks": "M"},
        {"parallel": {"tensor": 2}},
        {"recompute_blocks": "E"},
        {"parallel": {"context": 2}, "recompute": "full"},
    )
    stages = resolve_stages(config)
    assert [describe_parallel(stage.config.parallel) for stage in stages] == [
        "{}",
        "{tensor: 2}",
        "{tensor: 2}",
        "{context: 2}",
    ]
    assert [(stage.train.recompute, stage.train.recompute_blocks) for stage in stages] == [
        *(("selective", "M"), ("selective", "M"), ("selective", "E"), ("full", ""))
    ]
    assert fresh_starts(config) == [stages[1].first_step, stages[3].first_step]


def test_a_stage_takes_the_most_ranks_that_its_own_layout_can_use() -> None:
    config = staged({}, {"parallel": {"tensor": 2}}, {})
    stages = resolve_stages(config)
    choices = [3, 2, 1]
    check_run(config, choices)
    assert [ranks_of_stage(config, stage, choices) for stage in stages] == [3, 2, 2]


def test_ranks_that_nobody_starts_anew_must_suit_every_stage_to_come() -> None:
    config = staged({}, {"parallel": {"tensor": 2}})
    text = refusal(config, 3)
    assert "stages.1.parallel" in text
    assert "in stage stage1: tensor 2 x context 1 x pipeline 1 = 2 must divide the 3 ranks" in text
    check_run(config, 3, goes_on=True)
    # Stages that are done may have had other ranks.
    assert "train.global_batch_size" in refusal(config, 2)
    check_run(config, 2, steps_done=2)


def test_a_layout_that_serves_nobody_is_refused_with_its_stage_rule_and_the_nearest() -> None:
    config = staged({}, {"name": "long", "parallel": {"tensor": 3, "expert": 2}})
    text = refusal(config, [3, 2, 1])
    assert "stages.1.parallel.tensor = 3: in stage long: must divide model.vocab_size=448" in text
    assert "the nearest layout for 3 ranks is {}" in text
    assert "the nearest layout for 2 ranks is {tensor: 2, expert: 2}" in refusal(config, [2, 1], steps_done=2)
