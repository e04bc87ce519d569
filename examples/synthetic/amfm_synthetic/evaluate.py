"""Accuracy of a checkpoint on a synthetic task, at any length of rows, on rows that no training sees.

They are made on the way from seed and number; those of the validation split are never drawn for training. Rows longer than
those of the training show how far a mixer generalises over length. Memory holds `rows_at_once` rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from amfm.data_pipeline.config import DataConfig, SyntheticConfig, TaskName
from amfm.data_pipeline.loader.loader import PretrainLoader
from amfm.model.packing import PackMeta
from amfm.pretrain.config.file import change_section
from amfm.pretrain.inference.weights import Weights, read_weights
from amfm.pretrain.scores import Accuracy, count_correct, measure_accuracy
from amfm_synthetic.tasks import SETTINGS, build_task

DEFAULT_LENGTH = 256
DEFAULT_ROWS = 256


@dataclass(frozen=True)
class SyntheticEvaluation:
    """Accuracy, mean negative log-likelihood a labelled token in nats, and the task they were measured on.

    `settings`: those that the task reads. `chance`: the accuracy of always predicting the same label.
    """

    task: TaskName
    settings: dict[str, int]
    sequence_length: int
    accuracy: Accuracy
    loss: float
    chance: float


def evaluate_synthetic(
    checkpoint: str | Path,
    task: TaskName,
    *,
    overrides: Sequence[str] = (),
    sequence_length: int | None = None,
    num_rows: int = DEFAULT_ROWS,
    rows_at_once: int = 8,
    device: str = "cpu",
    backend: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> SyntheticEvaluation:
    """Evaluate a checkpoint, a run or an imported model on the validation sequences of a synthetic task, in float32.

    `overrides`: settings of the task as `key=value`, over those of the run if it trained on the task; `sequence_length`:
    default the run's; `progress` gets rows done and in all. Raises ValueError for settings that do not fit together, for
    rows too short for the task and for a vocabulary smaller than the task's.
    """
    weights = read_weights(checkpoint)
    config = choose_task(weights, task, overrides)
    length = sequence_length or weights.trained_length() or DEFAULT_LENGTH
    built = build_task(config)
    if built.vocab_size > weights.model.vocab_size:
        raise ValueError(
            f"the synthetic task {task} has {built.vocab_size} tokens with these settings, and {weights.origin} has "
            f"model.vocab_size={weights.model.vocab_size}; choose settings with fewer, or train with more"
        )
    rows_at_once = min(rows_at_once, num_rows)
    loader = PretrainLoader(
        DataConfig(synthetic=config, num_workers=0),
        split="validation",
        sequence_length=length,
        micro_batch_size=1,
        seed=weights.run.train.seed if weights.run is not None else 0,
    )
    model = weights.build(backend=backend, device=device)
    counts, nll = [], 0.0
    for first in range(0, num_rows, rows_at_once):
        size = min(rows_at_once, num_rows - first)
        # One micro-batch of all rows at once; the loader continues where it stopped, so no row comes twice.
        (batch,) = loader.take(size, size)
        tokens_BT, labels_BT = batch.tokens_BT.to(device), batch.labels_BT.to(device)
        with torch.inference_mode():
            output = model(
                tokens_BT, PackMeta.one_document_a_row(size, length, device=device), labels_BT, predicts=True
            )
        assert output.loss is not None and output.predictions_BT is not None, "labels and predictions were asked for"
        nll += float(output.loss.nll_sum.double())
        counts.append(count_correct(output.predictions_BT, labels_BT).cpu())
        if progress is not None:
            progress(first + size, num_rows)
    loader.close()
    accuracy = measure_accuracy(torch.cat(counts))
    settings = {name: getattr(config, name) for name in SETTINGS[config.task]}
    return SyntheticEvaluation(task, settings, length, accuracy, nll / accuracy.num_labels, 1 / built.num_classes)


def choose_task(weights: Weights, task: TaskName, overrides: Sequence[str]) -> SyntheticConfig:
    """Choose the task's settings: those of the run if it trained on the task, else the defaults, with the overrides over them.

    Raises ConfigError for an override that is wrong, ValueError for one that names another task.
    """
    trained = weights.run.data.synthetic if weights.run is not None else None
    config = change_section(trained if trained and trained.task == task else SyntheticConfig(task=task), overrides)
    if config.task != task:
        raise ValueError(f"task={config.task} cannot be set on the synthetic task {task}; name the task itself")
    return config
