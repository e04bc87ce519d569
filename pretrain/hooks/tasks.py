"""What the model answers while it trains: tasks of lm-eval, where rank 0 asks and all ranks answer, and continuations of prompts.

Only rank 0 has lm-eval, the tasks and their data: a thousand ranks that each downloaded a data set would be a storm.
A task that cannot be measured is said, recorded (`tasks_failed` in events.jsonl) and tried again the next time; the run
continues. An error of the model ends the run like one in a step.

Weights are the run's own, in its precision and on its layout of ranks, whatever it is: log-likelihoods take the pass that
validation takes. Tasks that generate text need whole rows, a token at a time: pipeline and context ranks, and tensor ranks
that share the tokens of a row, reject them.

Samples continue the texts of `evaluate.prompts` after each validation, always by the likeliest token: nothing shows sooner what
a model has learned, and what a change of data does to it. The texts are in the step's line of metrics.jsonl, and in the report
next to each other.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from amfm.data_pipeline.tokenizer.tokenizer import load_tokenizer
from amfm.model.hybrid import ModelOutput
from amfm.pretrain.checks.tasks import SETTING, generation_rule
from amfm.pretrain.config.schema import ParallelConfig, RunConfig
from amfm.pretrain.hook import Hook
from amfm.pretrain.inference.over_ranks import RowPasses
from amfm.pretrain.micro_batch import MicroBatch
from amfm.pretrain.parallel import Parallel
from amfm.pretrain.ranks.group import RankGroup
from amfm.pretrain.run import Run
from amfm.pretrain.stages import is_due
from amfm.pretrain.step import forward_only
from amfm.pretrain.step_sums import StepResult
from amfm.pretrain.tasks.scoring import GreedyJob, Scorer
from amfm.pretrain.tasks.suite import TaskChoice, TaskSuite, measure_together, open_on_first

NEW_TOKENS = 60


def open_tasks(config: RunConfig, parallel: Parallel) -> TaskSuite | None:
    """Find the run's tasks by name and load their data, on rank 0; None on the others.

    Data that cannot be had is no reason not to train: it is tried again at each measurement. Every rank must call this.
    Raises ValueError on every rank for unknown names, a missing lm-eval, and generation on ranks that share tokens.
    """
    section = config.evaluate
    choice = TaskChoice(section.tasks, section.include_path, section.limit, section.num_fewshot)
    suite = open_on_first(choice, SETTING, RankGroup(parallel.rank, parallel.world_size))
    kinds = set() if suite is None or suite.loaded is None else suite.kinds()
    problem = generation_problem(config.evaluate.tasks, kinds, config.parallel)
    problem = RankGroup(parallel.rank, parallel.world_size).broadcast(problem)
    if problem is not None:
        raise ValueError(problem)
    return suite


class Tasks(Hook):
    """Measures the tasks of `evaluate` when that is due; `suite`: only on the main rank."""

    def __init__(self, run: Run, suite: TaskSuite | None) -> None:
        self.run, self.suite = run, suite

    def at_start(self) -> None:
        """Report what keeps the tasks from being measured so far."""
        if self.suite is not None and self.suite.problem is not None:
            text = f"warning: {self.suite.problem}; tried again when tasks are due, training continues without them"
            self.run.tell("tasks_failed", text, error=self.suite.problem)

    def after_step(self, result: StepResult) -> None:
        """Measure each `evaluate.every_steps`, and after the last step."""
        step, every = self.run.progress.step, self.run.config.evaluate.every_steps
        if is_due(step, every) or step == self.run.num_steps:
            began = time.monotonic()
            values = self.measure()
            spent = {"tasks_seconds": time.monotonic() - began}
            result.found.update({"tasks": values, **spent} if values else {})

    def measure(self) -> dict[str, float]:
        """Measure the tasks and return their values; none where that was not possible. Every rank must call this."""
        run = self.run
        run.clock("tasks")
        start = time.monotonic()
        scorer = build_scorer(run)
        run.engine.module.eval()
        section = run.built.parallel
        end = measure_together(
            self.suite, scorer, lambda suite: generation_problem(suite.choice.names, suite.kinds(), section)
        )
        run.engine.module.train()
        step = f"step {run.progress.step}"
        if end.problem is not None:
            text = f"warning: {step}: tasks were not measured, training continues: {end.problem}"
            run.tell("tasks_failed", text, error=end.problem)
            return end.values
        shown = ", ".join(f"{name} {value:.4g}" for name, value in list(end.values.items())[:8])
        seconds = round(time.monotonic() - start, 3)
        run.tell("tasks", f"{step}: tasks: {shown}", values=end.values, seconds=seconds)
        return end.values


def build_scorer(run: Run) -> Scorer:
    """Build what answers jobs on this rank, on the run's engine."""
    train = run.stage.train

    def pass_rows(micro_batches: Sequence[MicroBatch]) -> Iterator[ModelOutput]:
        run.clock("tasks")  # each pass is progress, however many the tasks ask for
        return forward_only(run, micro_batches, predicts=True)

    def forward(*inputs: Any) -> ModelOutput:
        run.clock("tasks")
        output: ModelOutput = run.engine.forward(*inputs)
        return output

    # A schedule wants as many micro-batches as in training.
    in_training = train.global_batch_size // (train.micro_batch_size * run.parallel.data_world_size)
    passes = RowPasses(
        pass_rows,
        run.parallel,
        run.config.evaluate.micro_batch_size or train.micro_batch_size,
        as_in_training=True,
        micro_batches=1 if run.pipeline is None else in_training,
    )
    return Scorer(
        passes=passes,
        forward=forward,
        empty_state=run.model.empty_state,
        tokenizer=load_tokenizer(run.config.data.text_store()),
        max_length=train.sequence_length,
        row_length=train.sequence_length,
    )


def generation_problem(names: Sequence[str], kinds: set[str], parallel: ParallelConfig) -> str | None:
    """Report why tasks that generate cannot run where ranks share the tokens or the blocks of a row: there is one token at
    a time.
    """
    rule = generation_rule(parallel)
    if rule is None or "generate_until" not in kinds:
        return None
    return (
        f"{SETTING}: a task of {', '.join(names)} {rule}; leave the task out, and run "
        "`amfm evaluate RUN --tasks NAMES` on the checkpoints"
    )


class Samples(Hook):
    """Adds `samples` to the line of a step that was validated: a text for each prompt. Raises ValueError for a layout that cannot."""

    def __init__(self, run: Run) -> None:
        self.run, self.prompts = run, run.config.evaluate.prompts
        rule = generation_rule(run.built.parallel)
        if rule is not None:
            raise ValueError(f"evaluate.prompts {rule}; remove it, and run `amfm generate RUN` on the checkpoints")

    def after_step(self, result: StepResult) -> None:
        """Continue each prompt where the run was just validated."""
        if "validation_loss" not in result.found:
            return
        began, module = time.perf_counter(), self.run.engine.module
        scorer = build_scorer(self.run)
        ids = tuple(tuple(scorer.tokenizer.encode(prompt)) for prompt in self.prompts)
        module.eval()
        new = scorer.run(GreedyJob(ids, (NEW_TOKENS,) * len(ids), ((),) * len(ids)))
        module.train()
        decode = scorer.tokenizer.decode
        texts = [decode([*given, *more])[len(decode(list(given))) :] for given, more in zip(ids, new, strict=True)]
        result.found["samples"] = dict(zip(self.prompts, texts, strict=True))
        result.found["validation_seconds"] += time.perf_counter() - began
