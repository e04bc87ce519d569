"""Samples over time: what a model continues its prompts with is in the lines of validated steps, and in the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.hooks.tasks import NEW_TOKENS
from amfm.pretrain.inference.generate import Sampling, generate
from amfm.pretrain.report.report import write_report
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import Trained, read_metrics, tiny_config, train_and_collect

PROMPTS = ("the king", "<b>")
EVERY: dict[str, Any] = {"train__validate_every_steps": 2}
SMALL: dict[str, Any] = {"model__pattern": "*-", "model__moe": None}


def test_samples_are_what_the_checkpoint_generates_and_the_run_does_not_change(
    data: DataConfig, tmp_path: Path
) -> None:
    plain = train_and_collect(tiny_config(data, tmp_path / "plain", **EVERY, **SMALL))
    sampled = train_and_collect(tiny_config(data, tmp_path / "run", evaluate__prompts=PROMPTS, **EVERY, **SMALL))
    assert [line["loss"] for line in sampled.metrics] == [line["loss"] for line in plain.metrics]
    lines = {line["step"]: line["samples"] for line in read_metrics(tmp_path / "run") if "samples" in line}
    assert set(lines) == {2, 4} and all(tuple(texts) == PROMPTS for texts in lines.values())
    likeliest = Sampling(temperature=0)
    for prompt in PROMPTS:
        expected = generate(tmp_path / "run", prompt, max_new_tokens=NEW_TOKENS, sampling=likeliest)
        assert lines[4][prompt] == "".join(expected)
    page = write_report([tmp_path / "run"]).read_text()
    assert "<p>&lt;b&gt; &hellip;</p>" in page and page.count("<tr><th>step 4</th>") == len(PROMPTS)


LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"parallel__tensor": 2},
    "expert": {"parallel__expert": 2, "parallel__zero_stage": 2},
    "zero 3": {"parallel__zero_stage": 3},
}


def train_layout(data: DataConfig, folder: str, name: str) -> Trained:
    settings = EVERY | {"evaluate__prompts": PROMPTS, "train__micro_batch_size": 1} | LAYOUTS.get(name, {})
    return train_and_collect(tiny_config(data, Path(folder, name), **settings))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_that_can_continues_as_one_rank_does(data: DataConfig, tmp_path: Path, name: str) -> None:
    run_ranks(train_layout, data, str(tmp_path), "one", num_ranks=1)
    run_ranks(train_layout, data, str(tmp_path), name, num_ranks=2)
    found, expected = (read_metrics(tmp_path / each)[1]["samples"] for each in (name, "one"))
    assert {prompt: text[:20] for prompt, text in found.items()} == {
        prompt: text[:20]
        for prompt, text in expected.items()  # a tie may fall to the other side later
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parallel__pipeline": 2}, r"generates text, a token at a time, and parallel.pipeline=2 shares sequences"),
        ({"evaluate__prompts": ("a", "a")}, "must be different texts"),
    ],
)
def test_prompts_that_no_rank_could_continue_are_refused(
    change: dict[str, object], message: str, data: DataConfig, tmp_path: Path
) -> None:
    config = tiny_config(data, tmp_path, **({"evaluate__prompts": PROMPTS} | change))
    with pytest.raises(ConfigError, match=f"evaluate.prompts.*{message}"):
        check_run(config)
