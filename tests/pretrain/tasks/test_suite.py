"""Tasks are found by name and give numbers; what is wrong with them is one message, and random state stays as it was."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.tokenizer.tokenizer import load_tokenizer
from amfm.pretrain.tasks.scoring import GreedyJob, Job, Likelihood, LikelihoodJob
from amfm.pretrain.tasks.suite import TaskChoice, TaskError, flatten_results, open_suite
from tests.pretrain.tasks.task_files import CHOICE, WEIGH, WRITE, write_task

pytest.importorskip("lm_eval")


def answer(job: Job) -> list[Any]:
    """A model that likes short rows and always writes its last id again."""
    if isinstance(job, GreedyJob):
        return [[prompt[-1]] * limit for prompt, limit in zip(job.prompts, job.limits)]
    return [Likelihood(-float(count), False) for count in job.counts]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "tasks"


def measure(folder: Path, data: DataConfig, *names: str, max_length: int = 48) -> dict[str, float]:
    suite = open_suite(TaskChoice(names, str(folder)), "evaluate.tasks")
    return suite.measure(answer, load_tokenizer(data.text_store()), max_length)


def test_three_kinds_of_task_give_numbers_again_and_again(folder: Path, data: DataConfig) -> None:
    names = [write_task(folder, f"{number}_task", kind) for number, kind in enumerate((CHOICE, WRITE, WEIGH))]
    before = random.getstate(), torch.get_rng_state()
    found = measure(folder, data, *names)
    assert set(found) == {"0_task/acc", "1_task/exact_match", "2_task/bits_per_byte"}
    assert found == measure(folder, data, *names)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


@pytest.fixture(params=["few", pytest.param("all", marks=pytest.mark.slow)])
def shipped(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own folder of tasks: all its thousands, which take it a quarter of a minute to read, or one of ours."""
    if request.param == "few":
        write_task(tmp_path / "shipped", "shipped", CHOICE)
        monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "shipped" / "manager.py"))


def test_unknown_names_and_folders_are_refused_by_name(folder: Path, shipped: None) -> None:
    write_task(folder, "here", CHOICE)
    with pytest.raises(ValueError, match=r"evaluate\.tasks: lm-eval knows no task neverheard.*that folder has here"):
        open_suite(TaskChoice(("here", "neverheard"), str(folder)), "evaluate.tasks")
    with pytest.raises(ValueError, match="is not a folder"):
        open_suite(TaskChoice(("here",), str(folder / "absent")), "evaluate.tasks")


def test_data_that_is_not_there_is_the_tasks_fault(folder: Path, data: DataConfig) -> None:
    write_task(folder, "lost", CHOICE)
    (folder / "lost.jsonl").unlink()
    with pytest.raises(TaskError, match=r"the data of lost cannot be loaded: .*lost\.jsonl"):
        measure(folder, data, "lost")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (WRITE, {"generation_kwargs": {"do_sample": True, "temperature": 0.7}}, "the task samples"),
        (
            WRITE,
            {"generation_kwargs": {"until": ["\n"]}},
            "generates up to 256 tokens, and the model was trained on sequences of 48",
        ),
        (WRITE, {"generation_kwargs": {"max_gen_toks": -1}}, "the task generates -1 tokens at most; set max_gen_toks"),
        (CHOICE, {"doc_to_text": "{{nothing}}"}, "nothing"),
    ],
)
def test_what_a_task_cannot_ask_is_said_in_one_line(
    folder: Path, data: DataConfig, kind: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    write_task(folder, "odd", kind, **changes)
    with pytest.raises(TaskError, match=message) as caught:
        measure(folder, data, "odd")
    assert "\n" not in str(caught.value)


def test_a_context_of_blanks_alone_is_as_an_empty_one(folder: Path, data: DataConfig) -> None:
    write_task(folder, "blank", CHOICE, doc_to_text="  ")
    suite, tokenizer = (
        open_suite(TaskChoice(("blank",), str(folder)), "evaluate.tasks"),
        load_tokenizer(data.text_store()),
    )
    jobs: list[LikelihoodJob] = []

    def keep(job: Job) -> list[Any]:
        assert isinstance(job, LikelihoodJob)
        jobs.append(job)
        return answer(job)

    assert set(suite.measure(keep, tokenizer, 48)) == {"blank/acc"}
    (job,) = jobs
    assert all(row[0] == tokenizer.bos_id and len(row) == count + 1 for row, count in zip(job.rows, job.counts))


def test_an_error_of_the_model_is_no_error_of_the_task(folder: Path, data: DataConfig) -> None:
    write_task(folder, "sound", CHOICE)
    suite = open_suite(TaskChoice(("sound",), str(folder)), "evaluate.tasks")

    def fail(job: Job) -> list[Any]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match=r"^out of memory$") as caught:
        suite.measure(fail, load_tokenizer(data.text_store()), 48)
    assert not isinstance(caught.value, TaskError)


def test_standard_errors_and_names_are_left_out_of_results() -> None:
    found = flatten_results(
        {"a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": "N/A", "exact_match,strict": 1, "sample_len": 3}}
    )
    assert found == {"a/acc": 0.5, "a/exact_match/strict": 1.0}
