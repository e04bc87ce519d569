"""Tasks in the loop: measured on the run's own model, logged, and without a trace in what the run computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.hooks.tasks import Tasks, build_scorer, generation_problem
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.report.report import write_report
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.tasks.scoring import Likelihood, LikelihoodJob
from amfm.pretrain.tasks.suite import TaskChoice, evaluate_tasks, open_suite
from amfm.pretrain.train import train
from tests.helpers.spawn import run_ranks
from tests.pretrain.tasks.task_files import CHOICE, WEIGH, WRITE, write_task
from tests.pretrain.tiny_run import read_events, read_metrics, tiny_config

pytest.importorskip("lm_eval")
NAMES = ("choice", "write", "weigh")
SMALL: dict[str, Any] = {"model__pattern": "*-", "model__moe": None}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, kind in zip(NAMES, (CHOICE, WRITE, WEIGH)):
        write_task(tmp_path / "tasks", name, kind)
    return tmp_path / "tasks"


def with_tasks(folder: Path, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"include_path": str(folder), "tasks": NAMES, "every_steps": 2} | changes
    return {f"evaluate__{name}": value for name, value in settings.items()}


def test_a_run_logs_its_tasks_which_its_report_shows_and_trains_as_without_them(
    data: DataConfig, folder: Path, tmp_path: Path
) -> None:
    assert train(tiny_config(data, tmp_path / "plain", **SMALL)) == 0
    assert train(tiny_config(data, tmp_path / "tasks_too", **SMALL, **with_tasks(folder))) == 0
    plain, measured = read_metrics(tmp_path / "plain"), read_metrics(tmp_path / "tasks_too")
    assert [line["loss"] for line in measured] == [line["loss"] for line in plain]
    assert [line["step"] for line in measured if "tasks" in line] == [2, 4]
    assert set(measured[-1]["tasks"]) == {"choice/acc", "write/exact_match", "weigh/bits_per_byte"}
    assert [event["values"] for event in read_events(tmp_path / "tasks_too", "tasks")] == [
        measured[1]["tasks"],
        measured[3]["tasks"],
    ]
    again = evaluate_tasks(tmp_path / "tasks_too", TaskChoice(NAMES))
    assert again == pytest.approx(measured[-1]["tasks"], rel=1e-5)
    measured[1]["tasks"], measured[3]["tasks"] = {"quiz/acc": 0.25, "quiz/perplexity": 9.5}, {"quiz/acc": 0.5}
    (tmp_path / "tasks_too" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in measured))
    page = write_report([tmp_path / "tasks_too"]).read_text()
    assert "lm-eval on the model as it trains." in page and "quiz/perplexity" in page and "<td>0.25</td>" in page


def test_each_forward_pass_of_a_task_is_progress_to_the_watchdog(
    data: DataConfig, folder: Path, tmp_path: Path
) -> None:
    with SignalWatch() as signals:
        run = start_run(tiny_config(data, tmp_path / "run", **with_tasks(folder, tasks=("choice",))), signals)
        phases: list[str] = []
        run.heartbeat.listener = phases.append
        next(hook for hook in run.hooks if isinstance(hook, Tasks)).measure()
        assert len(phases) > 2 and set(phases) == {"tasks"}
        close_run(run)


def test_a_task_without_data_is_told_and_training_goes_on(data: DataConfig, folder: Path, tmp_path: Path) -> None:
    (folder / "weigh.jsonl").unlink()
    assert train(tiny_config(data, tmp_path / "run", **SMALL, **with_tasks(folder))) == 0
    failures = read_events(tmp_path / "run", "tasks_failed")
    assert [event["step"] for event in failures] == [0, 2, 4]
    assert "weigh.jsonl" in failures[0]["error"]
    assert not [line for line in read_metrics(tmp_path / "run") if "tasks" in line]


def test_tasks_that_cannot_be_found_are_refused_before_training(data: DataConfig, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder; name one with lm-eval's YAML files"):
        train(tiny_config(data, tmp_path / "run", **with_tasks(folder / "absent")))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


LIKELIHOODS = {"evaluate__tasks": ("choice", "weigh")}
ONE_ROW = {"train__micro_batch_size": 1, "train__global_batch_size": 4}
LAYOUTS: dict[str, dict[str, Any]] = {
    "zero3": {"parallel__zero_stage": 3},
    "tensor": {"parallel__tensor": 2},
    "tensor_sequence": {
        "parallel__tensor": 2,
        "parallel__sequence_parallel": True,
        **LIKELIHOODS,
    },
    "expert": {"parallel__expert": 2},
    "pipeline": {"parallel__pipeline": 2, **LIKELIHOODS},
    "context": {"parallel__context": 2, **LIKELIHOODS},
    "eight": {"parallel__pipeline": 2, "parallel__context": 2, "parallel__expert": 2, **LIKELIHOODS},
}


def train_layout(data: DataConfig, root: str, name: str) -> None:
    settings = with_tasks(Path(root, "tasks"), every_steps=4) | LAYOUTS.get(name, {})
    assert train(tiny_config(data, Path(root, name), train__micro_batch_size=1, **settings)) == 0


def score_layouts(data: DataConfig, folder: str, names: tuple[str, ...]) -> dict[str, list[Likelihood]]:
    rows = tuple(tuple(range(start, start + length)) for start, length in ((9, 49), (3, 7), (40, 30), (5, 2), (8, 21)))
    found = {}
    for name in names:
        layout = {key: value for key, value in LAYOUTS.get(name, {}).items() if key.startswith("parallel")}
        config = tiny_config(data, Path(folder, name), **ONE_ROW, **layout)
        with SignalWatch() as signals:
            run = start_run(config, signals)
            run.engine.module.eval()
            found[name] = build_scorer(run).run(LikelihoodJob(rows, (40, 1, 30 - 1, 1, 20)))
            close_run(run)
    return found


@pytest.mark.parametrize("names", [("pipeline",), pytest.param(("context", "expert"), marks=pytest.mark.slow)])
def test_pipeline_context_and_expert_ranks_score_what_one_rank_scores(
    data: DataConfig, tmp_path: Path, names: tuple[str, ...]
) -> None:
    (one,) = run_ranks(score_layouts, data, str(tmp_path), ("one",), num_ranks=1)
    for found in run_ranks(score_layouts, data, str(tmp_path), names, num_ranks=2):
        for name, answers in found.items():
            for answer, expected in zip(answers, one["one"], strict=True):
                assert answer.log_probability == pytest.approx(expected.log_probability, rel=1e-5), name
                assert answer.is_greedy == expected.is_greedy, name


def test_runs_whose_ranks_share_rows_measure_likelihoods_and_refuse_generation(
    data: DataConfig, folder: Path, tmp_path: Path
) -> None:
    suite = open_suite(TaskChoice(NAMES, str(folder)), "evaluate.tasks")
    suite.load()
    for axis in ("pipeline", "context"):
        section = ParallelConfig.model_validate({axis: 2})
        message = generation_problem(NAMES, suite.kinds(), section)
        assert message is not None and f"and parallel.{axis}=2 shares sequences between ranks" in message
        settings: dict[str, Any] = {f"parallel__{axis}": 2, **ONE_ROW}
        check_run(tiny_config(data, tmp_path, **with_tasks(folder), **settings), 2)
    suite = open_suite(TaskChoice(("choice", "weigh"), str(folder)), "evaluate.tasks")
    suite.load()
    assert generation_problem(NAMES, suite.kinds(), section) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "eight"])
def test_every_layout_of_ranks_finds_the_same_values(data: DataConfig, folder: Path, tmp_path: Path, name: str) -> None:
    check_layout(data, tmp_path, name, num_ranks=2)


@pytest.mark.slow
def test_eight_ranks_of_pipeline_context_and_experts_find_what_one_rank_finds(
    data: DataConfig, folder: Path, tmp_path: Path
) -> None:
    check_layout(data, tmp_path, "eight", num_ranks=8)


def check_layout(data: DataConfig, tmp_path: Path, name: str, num_ranks: int) -> None:
    """Items are right or wrong exactly alike; likelihoods agree within the rounding of float32 and what training added."""
    run_ranks(train_layout, data, str(tmp_path), "one", num_ranks=1)
    expected = read_metrics(tmp_path / "one")[-1]["tasks"]
    run_ranks(train_layout, data, str(tmp_path), name, num_ranks=num_ranks)
    found = read_metrics(tmp_path / name)[-1]["tasks"]
    assert found and found["choice/acc"] == expected["choice/acc"]
    assert found == pytest.approx({key: expected[key] for key in found}, rel=1e-4), name


def refuse_generation(data: DataConfig, root: str) -> None:
    settings = with_tasks(Path(root, "tasks")) | {"parallel__tensor": 2, "parallel__sequence_parallel": True}
    with pytest.raises(ValueError, match=r"generates text, a token at a time, and parallel\.tensor=2"):
        train(tiny_config(data, Path(root, "refused"), train__micro_batch_size=1, **settings))


@pytest.mark.slow
def test_generation_is_refused_where_ranks_share_the_tokens_of_a_row(
    data: DataConfig, folder: Path, tmp_path: Path
) -> None:
    run_ranks(refuse_generation, data, str(tmp_path), num_ranks=2)
