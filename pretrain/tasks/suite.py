"""The tasks of a run or of a command: found by name, their data loaded once, run as often as the model is to be measured.

lm-eval draws few-shot examples from generators that it seeds process-wide, so each of our calls seeds as lm-eval's own
command does, for equal numbers, and puts the generators back as they were, for a run that continues as if nothing had
been.

Whatever a task's own code, template or data raises is the evaluation's fault and becomes a `TaskError`, on which a run
continues. What the model raises passes through.

Tasks of lm-eval on a checkpoint, a run or an imported model, on one rank or over several.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch

from amfm.data_pipeline.tokenizer.tokenizer import Tokenizer
from amfm.pretrain.checkpoint.files import collect_random_state, restore_random_state
from amfm.pretrain.failures import describe
from amfm.pretrain.inference.over_ranks import Precision, RowPasses, Work, join_ranks, open_model
from amfm.pretrain.inference.weights import read_weights
from amfm.pretrain.packages import describe_missing, is_installed
from amfm.pretrain.ranks.group import RankGroup
from amfm.pretrain.tasks.scoring import Job, Scorer

# Seeds of lm-eval's command: Python; numpy, torch and few-shot examples.
PYTHON_SEED, OTHER_SEED = 0, 1234


class TaskError(RuntimeError):
    """A task that cannot be measured, its data or its code at fault and not the model; training continues without
    it.
    """


@dataclass(frozen=True)
class TaskChoice:
    """Which tasks: names of tasks, groups or tags of lm-eval; a folder with YAML files of further ones; how much of them.

    limit: documents of each task. num_fewshot: examples before each question; None: as each task says.
    """

    names: tuple[str, ...]
    include_path: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None


@dataclass
class TaskSuite:
    """Tasks that were found; `loaded`: their data by name; `problem`: why it cannot be had. Only on the asking rank."""

    choice: TaskChoice
    manager: Any
    loaded: dict[str, Any] | None = None
    problem: str | None = None

    def load(self) -> None:
        """Load the data of every task, once. Raises TaskError."""
        if self.loaded is not None:
            return
        with _seeded():
            try:
                loaded = self.manager.load(list(self.choice.names))
            # A task is other people's YAML, Python and data: whatever it raises is the task's fault, and training
            # continues.
            except Exception as error:
                self.problem = (
                    f"the data of {', '.join(self.choice.names)} cannot be loaded: {_explain(error)}; a task with local data "
                    "has dataset_path: json and dataset_kwargs.data_files in its YAML"
                )
                raise TaskError(self.problem) from error
        for task in loaded["tasks"].values():
            _set_fewshot(task, self.choice.num_fewshot)
        self.loaded, self.problem = loaded, None

    def kinds(self) -> set[str]:
        """What the loaded tasks ask for: loglikelihood, loglikelihood_rolling, multiple_choice, generate_until."""
        assert self.loaded is not None, "load comes first"
        return {str(task.get_config("output_type")) for task in self.loaded["tasks"].values()}

    def measure(self, answer: Callable[[Job], list[Any]], tokenizer: Tokenizer, max_length: int) -> dict[str, float]:
        """Measure every task: values by TASK/METRIC (TASK/METRIC/FILTER where a task filters answers), without errors.

        `answer` runs a job on the model and must not disturb random state. Raises TaskError, and whatever `answer` raises.
        """
        from lm_eval.evaluator import evaluate

        from amfm.pretrain.tasks.adapter import ModelAdapter

        self.load()
        assert self.loaded is not None, "loaded above"
        model = ModelAdapter(answer, tokenizer, max_length)
        with _seeded():
            for task in self.loaded["tasks"].values():
                task.set_fewshot_seed(seed=OTHER_SEED)
            try:
                found = evaluate(
                    lm=model, task_dict=self.loaded, limit=self.choice.limit, bootstrap_iters=0, log_samples=False
                )
            # As in `load`; what scoring itself raised is ours, and passes.
            except Exception as error:
                if model.scoring_failed:
                    raise
                raise TaskError(f"{', '.join(self.choice.names)} cannot be measured: {_explain(error)}") from error
        return flatten_results(found["results"])


def require_lm_eval(setting: str) -> None:
    """Raise ValueError if lm-eval is not installed."""
    if not is_installed("lm_eval"):
        raise ValueError(f"{describe_missing(setting, 'lm_eval', 'eval')}, or leave it out")


def open_suite(choice: TaskChoice, setting: str) -> TaskSuite:
    """Find the tasks by name; their data is not touched. `setting`: where the names were given, for messages.

    Raises ValueError for names that no one knows, a folder that is not one and a missing lm-eval. lm-eval
    passes over files that it cannot read.
    """
    require_lm_eval(setting)
    if choice.include_path is not None and not Path(choice.include_path).is_dir():
        raise ValueError(
            f"the folder of tasks {choice.include_path} is not a folder; name one with lm-eval's YAML files in it"
        )
    with _seeded():
        manager = _find_tasks(choice)
    unknown = [name for name in choice.names if name not in manager.all_tasks]
    if unknown:
        where = "" if choice.include_path is None else f" and not in {choice.include_path}"
        own = _own_names(choice.include_path)
        raise ValueError(
            f"{setting}: lm-eval knows no task {', '.join(unknown)}{where}; "
            + (f"that folder has {', '.join(own)}" if own else "`lm-eval ls tasks` lists what it knows")
        )
    return TaskSuite(choice, manager)


def _find_tasks(choice: TaskChoice) -> Any:
    """Index the folder's tasks, and with them lm-eval's own thousands where those of the folder do not suffice."""
    from lm_eval.tasks import TaskManager

    if choice.include_path is not None:
        manager = TaskManager(include_path=choice.include_path, include_defaults=False)
        if set(choice.names) <= set(manager.all_tasks):
            return manager
    return TaskManager(include_path=choice.include_path)


def flatten_results(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Turn lm-eval's results into numbers by TASK/METRIC; standard errors and aliases are left out."""
    flat = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, _, filter_name = key.partition(",")
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or metric.endswith("_stderr")
                or not filter_name
            ):
                continue
            flat[f"{task}/{metric}" + ("" if filter_name == "none" else f"/{filter_name}")] = float(value)
    return flat


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    """Set the examples before each question, as lm-eval's command does: a task that says 0 keeps it."""
    given = task.get_config("num_fewshot")
    if num_fewshot is not None and given != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif given is None:
        task.set_config(key="num_fewshot", value=0)


def _own_names(folder: str | None) -> Sequence[str]:
    """Names of the tasks in a folder, the first few."""
    if folder is None:
        return []
    from lm_eval.tasks import TaskManager

    return sorted(TaskManager(include_path=folder, include_defaults=False).all_tasks)[:8]


def _explain(error: Exception) -> str:
    """One line of an error of someone else's code; its class first, since many say little."""
    text = " ".join(describe(error).split())
    return f"{type(error).__name__}: {text}"[:500]


@contextmanager
def _seeded() -> Iterator[None]:
    """Seed all generators as lm-eval does, and keep it from printing; afterwards both are as they were."""
    import datasets
    from lm_eval.api import task

    states, bar, bars_off = collect_random_state(), task.tqdm, datasets.are_progress_bars_disabled()
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    random.seed(PYTHON_SEED)
    numpy.random.seed(OTHER_SEED)
    torch.manual_seed(OTHER_SEED)
    task.tqdm = partial(bar, disable=True)
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        task.tqdm = bar
        if not bars_off:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        restore_random_state(states)


@dataclass(frozen=True)
class Measured:
    """The last message of a measurement: values by TASK/METRIC, or what was wrong."""

    values: dict[str, float]
    problem: str | None = None


def open_on_first(choice: TaskChoice, setting: str, ranks: RankGroup) -> TaskSuite | None:
    """Find tasks by name and load their data, on rank 0; None on the others.

    Data that cannot be had stays in `TaskSuite.problem`. Every rank must call this. Raises ValueError on every rank for
    unknown names and a missing lm-eval.
    """
    require_lm_eval(setting)
    suite, problem = None, None
    if ranks.rank == 0:
        try:
            suite = open_suite(choice, setting)
            suite.load()
        except TaskError:
            pass  # kept in suite.problem
        except ValueError as error:
            problem = str(error)
    problem = ranks.broadcast(problem)
    if problem is not None:
        raise ValueError(problem)
    return suite


def measure_together(
    suite: TaskSuite | None, scorer: Scorer, refuse: Callable[[TaskSuite], str | None] = lambda suite: None
) -> Measured:
    """Measure the tasks of rank 0's suite on all ranks, which get the same values or the same problem.

    Rank 0 sends each job to all ranks, which run it in lock step, and then the end: ranks branch on nothing but what they
    were sent. reject: what is wrong with loaded tasks. Every rank must call this.
    """
    ranks = RankGroup(scorer.parallel.rank, scorer.parallel.world_size)
    if suite is None:
        while not isinstance(message := ranks.broadcast(None), Measured):
            scorer.run(message)
        return message

    def answer(job: Job) -> list[Any]:
        ranks.broadcast(job)
        return scorer.run(job)

    try:
        suite.load()
        end = Measured({}, refuse(suite))
        if end.problem is None:
            end = Measured(suite.measure(answer, scorer.tokenizer, scorer.max_length))
    except TaskError as error:
        end = Measured({}, str(error))
    ranks.broadcast(end)
    return end


# Tokens per sequence for an import, of which no length of training is known; an export of it says the same.
DEFAULT_LENGTH = 4096


def evaluate_tasks(
    checkpoint: str | Path,
    choice: TaskChoice,
    *,
    rows_at_once: int = 8,
    device: str = "cpu",
    backend: str = "auto",
    precision: Precision = "float32",
    num_ranks: int = 1,
    announce: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """Measure a model on tasks: values by TASK/METRIC, those that lm-eval gives on the model's export.

    Rows are as long as in training. `choice.include_path`: None means the folder that the run named, if it did. num_ranks:
    that a launcher started, all of which must call this. Raises ValueError for tasks that no one knows and a model without
    a tokenizer, TaskError for data that cannot be had.
    """
    weights = read_weights(checkpoint)
    tokenizer = weights.tokenizer
    if choice.include_path is None and weights.run is not None:
        choice = TaskChoice(choice.names, weights.run.evaluate.include_path, choice.limit, choice.num_fewshot)
    ranks = join_ranks(num_ranks)
    suite = open_on_first(choice, "--tasks", ranks)
    kinds, problem = (set[str](), suite and suite.problem) if suite is None or suite.problem else (suite.kinds(), None)
    kinds, problem = ranks.broadcast((kinds, problem))
    if problem is not None:
        raise TaskError(problem)
    length = weights.trained_length() or DEFAULT_LENGTH
    work = Work(rows_at_once * length, whole_rows="generate_until" in kinds)
    model, parallel = open_model(
        weights, ranks, work, device=device, backend=backend, precision=precision, announce=announce
    )
    scorer = Scorer(
        passes=RowPasses.of_model(model, rows_at_once, parallel=parallel, predicts=True),
        forward=model,
        empty_state=model.empty_state,
        tokenizer=tokenizer,
        max_length=length,
    )
    end = measure_together(suite, scorer)
    if end.problem is not None:
        raise TaskError(end.problem)
    return end.values
