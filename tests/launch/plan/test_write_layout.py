"""The winner of a search in the configuration's file."""

from dataclasses import replace

import pytest
import yaml

from amfm.launch.cli import run
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.write_layout import edited
from amfm.pretrain.config.file import load_config
from amfm.pretrain.config.schema import ParallelConfig
from tests.launch.plan.presets import CONFIGS

PARALLEL = {"tensor": 2, "sequence_parallel": True, "zero_stage": 1}
TRAIN = {"micro_batch_size": 4, "recompute": "selective", "recompute_blocks": "M"}


@pytest.mark.parametrize(
    "text",
    [
        "# Mine.\ntrain: {steps: 5, micro_batch_size: 2} # rows\nparallel: {zero_stage: 3} # one\noptimizer: {a: 1}\n",
        "parallel:\n  zero_stage: 3  # one\n\n# Mine.\ntrain:\n  steps: 5\n  # rows\n  micro_batch_size: 2\noptimizer: {a: 1}\n",
        "optimizer: {a: 1}  # one\n# Mine., rows\n",
    ],
    ids=["on one line", "on several lines", "without the sections"],
)
def test_only_the_layout_changes(text):
    found = edited(text, PARALLEL, TRAIN)
    before, after = yaml.safe_load(text), yaml.safe_load(found)
    assert after == before | {"parallel": PARALLEL, "train": before.get("train", {}) | TRAIN}
    assert all(comment in found for comment in ("# Mine.", "rows", "# one"))


@pytest.mark.parametrize(
    "text",
    [
        "parallel: {tensor: 1}\ntrain: {steps: 5}\nstages:\n  - name: a # one\n    steps: 5\n  - {name: b, steps: 5, recompute: full}\n"
        "  - name: c\n    recompute: full # two\n    steps: 5\n",
        "parallel: {tensor: 1}\ntrain: {steps: 5}\nstages: [{name: a, steps: 5}, {name: b, steps: 5}, {name: c, steps: 5}] # one two\n",
    ],
    ids=["on several lines", "on one line"],
)
def test_each_stage_gets_its_own_layout_or_says_nothing(text):
    own = {"parallel": {"tensor": 4, "sequence_parallel": True}, "micro_batch_size": 1}
    found = edited(text, PARALLEL, TRAIN, [{}, own, {}])
    assert "one" in found and "two" in found
    first, second, third = yaml.safe_load(found)["stages"]
    assert first == {"name": "a", "steps": 5}
    assert {name: second[name] for name in own} == own
    # A key that a stage has and must not keep holds what holds before it.
    for stage in (second, third):
        assert stage.get("recompute", TRAIN["recompute"]) == TRAIN["recompute"]
    assert "parallel" not in third


def test_the_winner_is_written_and_checked(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    base = tmp_path.with_suffix(".yaml")  # what the winner leaves out gets its default again
    interleaved = "{pipeline: 2, schedule: interleaved, virtual_stages: 2, balance: ranks}"
    base.write_text(f"extends: {CONFIGS}/ladder_20m.yaml\nparallel: {interleaved}\n", encoding="utf-8")
    path.write_text(f"extends: {base}\n\nrun: {{dir: run}}  # mine\n", encoding="utf-8")
    assert run(["plan", str(path), "--gpus", "2", "--write-layout"]) == 2
    assert "--search" in capsys.readouterr().err
    assert run(["plan", str(path), "--gpus", "2", "--search", "--write-layout"]) == 0
    assert f"wrote {path}" in capsys.readouterr().err.replace("\n", "")
    assert "# mine" in path.read_text(encoding="utf-8")
    written = load_config(path, ()).parallel
    assert written.zero_stage in (0, 1, 2, 3)
    assert (written.pipeline, written.virtual_stages, written.balance) == (1, 1, "chunks")
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.yaml"]


def test_balance_is_written_where_it_is_not_the_default():
    layout = Layout(8, 1, 1, pipeline=4, schedule="interleaved", virtual_stages=2)
    assert "balance" not in layout.settings()
    written = yaml.safe_load(edited("steps: 1\n", replace(layout, balance="ranks").settings(), TRAIN))
    assert ParallelConfig.model_validate(written["parallel"]).balance == "ranks"
