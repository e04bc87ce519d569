"""How much a checkpoint gets right of a probe, at any length of rows, on rows that no training sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.config import DataConfig, ProbeConfig, ProbeName
from data_pipeline.loader.loader import PretrainLoader
from data_pipeline.probes.build import SETTINGS, build_task
from model.packing import PackMeta
from pretrain.accuracy import Accuracy, count_answers, measure_accuracy
from pretrain.config.file import change_section
from pretrain.inference.weights import Weights, read_weights

DEFAULT_LENGTH = 256
DEFAULT_ROWS = 256


@dataclass(frozen=True)
class ProbeEvaluation:
    """Right answers, mean negative log-likelihood an answer in nats, and what was asked.

    `settings`: those that the task reads. `chance`: the share of answers that guessing the same one always gets right.
    """

    task: ProbeName
    settings: dict[str, int]
    sequence_length: int
    accuracy: Accuracy
    loss: float
    chance: float


def evaluate_probe(
    checkpoint: str | Path,
    task: ProbeName,
    *,
    overrides: Sequence[str] = (),
    sequence_length: int | None = None,
    num_rows: int = DEFAULT_ROWS,
    rows_at_once: int = 8,
    device: str = "cpu",
    backend: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> ProbeEvaluation:
    """Ask a checkpoint, a run or an imported model the validation rows of a probe, in float32.

    `overrides`: settings of the task as `key=value`, over those of the run if it trained on the task; `sequence_length`:
    default the run's; `progress` gets rows done and in all. Raises ValueError for settings that do not fit together, for
    rows too short for the task and for a vocabulary smaller than the task's.
    """
    weights = read_weights(checkpoint)
    probe = choose_probe(weights, task, overrides)
    length = sequence_length or weights.trained_length() or DEFAULT_LENGTH
    built = build_task(probe)
    if built.vocab_size > weights.model.vocab_size:
        raise ValueError(
            f"the probe {task} has {built.vocab_size} tokens with these settings, and {weights.origin} has "
            f"model.vocab_size={weights.model.vocab_size}; choose settings with fewer, or train with more"
        )
    rows_at_once = min(rows_at_once, num_rows)
    loader = PretrainLoader(
        DataConfig(probe=probe, num_workers=0),
        split="validation",
        sequence_length=length,
        micro_batch_size=1,
        seed=weights.run.train.seed if weights.run is not None else 0,
    )
    model = weights.build(backend=backend, device=device)
    counts, nll = [], 0.0
    for first in range(0, num_rows, rows_at_once):
        size = min(rows_at_once, num_rows - first)
        (batch,) = loader.take(size, size)
        tokens_BT, labels_BT = batch.tokens_BT.to(device), batch.labels_BT.to(device)
        with torch.inference_mode():
            output = model(
                tokens_BT, PackMeta.one_document_a_row(size, length, device=device), labels_BT, predicts=True
            )
        assert output.loss is not None and output.predictions_BT is not None, "labels and predictions were asked for"
        nll += float(output.loss.nll_sum.double())
        counts.append(count_answers(output.predictions_BT, labels_BT).cpu())
        if progress is not None:
            progress(first + size, num_rows)
    loader.close()
    accuracy = measure_accuracy(torch.cat(counts))
    settings = {name: getattr(probe, name) for name in SETTINGS[probe.task]}
    return ProbeEvaluation(task, settings, length, accuracy, nll / accuracy.num_answers, 1 / built.num_answers)


def choose_probe(weights: Weights, task: ProbeName, overrides: Sequence[str]) -> ProbeConfig:
    """The task with the settings of the run, if it trained on it, else with the defaults, and the overrides over them."""
    trained = weights.run.data.probe if weights.run is not None else None
    probe = change_section(trained if trained and trained.task == task else ProbeConfig(task=task), overrides)
    if probe.task != task:
        raise ValueError(f"task={probe.task} can't be set on the probe {task}; name the task itself")
    return probe
