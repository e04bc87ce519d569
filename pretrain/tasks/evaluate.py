"""Tasks of lm-eval on a checkpoint, a run or an imported model, in one process and in float32."""

from __future__ import annotations

from pathlib import Path

import torch

from amfm.pretrain.inference.weights import read_weights
from amfm.pretrain.tasks.scoring import Scorer, Share
from amfm.pretrain.tasks.suite import TaskChoice, open_suite

# Tokens per row for an import, of which no length of training is known; an export of it says the same.
DEFAULT_LENGTH = 4096


def evaluate_tasks(
    checkpoint: str | Path,
    choice: TaskChoice,
    *,
    rows_at_once: int = 8,
    device: str = "cpu",
    backend: str = "auto",
) -> dict[str, float]:
    """Measure a model on tasks: values by TASK/METRIC, those that lm-eval gives on the model's export.

    Rows are as long as in training. `choice.include_path`: None means the folder that the run named, if it did. Raises
    ValueError for tasks that no one knows and a model without a tokenizer, TaskError for data that cannot be had.
    """
    weights = read_weights(checkpoint)
    tokenizer = weights.tokenizer
    if choice.include_path is None and weights.run is not None:
        choice = TaskChoice(choice.names, weights.run.evaluate.include_path, choice.limit, choice.num_fewshot)
    suite = open_suite(choice, "--tasks")
    suite.load()
    model = weights.build(backend=backend, device=device)
    scorer = Scorer(
        forward=model,
        empty_state=model.empty_state,
        tokenizer=tokenizer,
        device=torch.device(device),
        max_length=weights.trained_length() or DEFAULT_LENGTH,
        rows_at_once=rows_at_once,
        share=Share(),
    )
    return suite.measure(scorer.run, tokenizer, scorer.max_length)
