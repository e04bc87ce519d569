"""Samples over time: after each validation the model continues the texts of `evaluate.prompts`, always the likeliest token.

Nothing shows sooner what a model has learned, and what a change of data does to it. The texts are in the step's line of
metrics.jsonl, and in the report next to each other. The weights are the run's own, on its ranks, as for tasks that generate.
"""

from __future__ import annotations

import time

from amfm.pretrain.checks.evaluate import generation_rule
from amfm.pretrain.hook import Hook
from amfm.pretrain.hooks.tasks import build_scorer
from amfm.pretrain.run import Run
from amfm.pretrain.step_sums import StepResult
from amfm.pretrain.tasks.scoring import GreedyJob

NEW_TOKENS = 60


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
