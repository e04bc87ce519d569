"""Validation: loss on held-out text, whole and by source, and the accuracy where the data is a synthetic task.

Measured on the run's own layout of ranks, with the batch and row length of its stage, so that losses of training and
validation compare. The loader starts at its first sample each time: two validations of a run see the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from amfm.data_pipeline.store.store import TokenStore
from amfm.pretrain.accuracy import Accuracy, count_correct, measure_accuracy
from amfm.pretrain.hook import Hook
from amfm.pretrain.micro_batch import move_batch
from amfm.pretrain.monitor.metrics import finite
from amfm.pretrain.parallel import Parallel
from amfm.pretrain.run import Run
from amfm.pretrain.source_losses import SourceLoss, bits_per_byte, losses_of, sum_by_source
from amfm.pretrain.stages import is_due
from amfm.pretrain.step import count_valid_tokens, forward_only
from amfm.pretrain.step_sums import StepResult, empty_sums


@dataclass(frozen=True)
class Validation:
    """Mean negative log-likelihood a token in nats, the tokens it was measured on, and the accuracy on a synthetic task.

    bits_per_byte, by_source: of text alone; by_source names the sources that these rows came from. mtp_accepted: for each
    depth of multi-token prediction, how often its most likely token is the one that follows.
    """

    loss: float
    tokens: int
    accuracy: Accuracy | None = None
    bits_per_byte: float | None = None
    by_source: dict[str, SourceLoss] = field(default_factory=dict)
    mtp_accepted: tuple[float, ...] = ()

    @property
    def perplexity(self) -> float:
        """exp(loss), of a loss cut at 700 nats, before float64 overflows."""
        return math.exp(min(self.loss, 700.0))


def validate(run: Run) -> Validation:
    """Measure loss and accuracy on the first `train.validation_batches` global batches of the validation split.

    The same text each time. Leaves weights, gradients, random state and the training data's cursor alone. Every rank must
    call this.
    """
    assert run.validation is not None, "data.validation_fraction is 0, so there is nothing to validate on"
    run.validation.seek(0)
    model = run.config.model
    sums = empty_sums(model, run.parallel.device)
    is_synthetic = run.config.data.probe is not None
    counts = torch.zeros(1 + model.num_depths, dtype=torch.int64, device=run.parallel.device)
    hits_D = torch.zeros(model.num_depths, dtype=torch.float64, device=run.parallel.device)
    num_rows = run.config.train.validation_batches * run.stage.global_batch_size
    counts_R2 = torch.zeros(num_rows, 2, dtype=torch.float64, device=run.parallel.device)
    names = run.validation.source_names
    sources_S2 = torch.zeros(len(names), 2, dtype=torch.float64, device=run.parallel.device)
    run.engine.module.eval()
    for _ in range(run.config.train.validation_batches):
        run.heartbeat.at(run.progress.step, "validate")  # each batch is progress, however many there are
        batches = run.validation.take(run.stage.global_batch_size, run.stage.micro_batch_size)
        counts += count_valid_tokens(batches, run.parallel, model)
        micro_batches = [move_batch(batch, run.parallel, model) for batch in batches]
        outputs = list(forward_only(run, micro_batches, predicts=is_synthetic))
        for output in outputs:
            sums.add(output)
            if output.mtp_hits is not None:
                hits_D += output.mtp_hits
        losses = [output.loss for output in outputs if output.loss is not None]
        for batch, micro_batch, loss in zip(batches, micro_batches, losses):
            sources_S2 += sum_by_source(loss.token_nll_R, micro_batch.labels_BT, batch.source_ids, len(names))
        predicted = [output.predictions_BT for output in outputs if output.predictions_BT is not None]
        for batch, micro_batch, predictions_BT in zip(batches, micro_batches, predicted):
            # Each rank fills in its rows, or its part of them, and the sum over ranks puts the counts together.
            # Validation begins at sample 0, so that a sample's number is its row here.
            counts_R2[list(batch.sample_ids)] = count_correct(predictions_BT, micro_batch.labels_BT)
    run.engine.module.train()
    tokens, *ahead = counts.tolist()
    mean = sums.reduce(run.parallel, counts).loss
    store = run.validation.store
    if not isinstance(store, TokenStore):
        return Validation(mean, tokens, measure_accuracy(run.parallel.all_reduce_unique(counts_R2)))
    by_source = {
        name: (nll, int(count))
        for name, (nll, count) in zip(names, run.parallel.all_reduce_unique(sources_S2).tolist())
    }
    return Validation(
        mean,
        tokens,
        bits_per_byte=bits_per_byte(by_source, store, "validation"),
        by_source=losses_of(by_source, store, "validation"),
        mtp_accepted=accepted_parts(hits_D, ahead, run.parallel),
    )


def accepted_parts(hits_D: torch.Tensor, tokens: Sequence[int], parallel: Parallel) -> tuple[float, ...]:
    """The part of its labels that each depth finds most likely; empty without depths. Every rank must call this."""
    if not tokens:
        return ()
    return tuple(hits / max(1, count) for hits, count in zip(parallel.all_reduce_unique(hits_D).tolist(), tokens))


class Validations(Hook):
    """Validates when that is due, and keeps the result for the step's log line."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def after_step(self, result: StepResult) -> None:
        """Validate each `train.validate_every_steps`, and after the last step."""
        step = self.run.progress.step
        if is_due(step, self.run.config.train.validate_every_steps) or step == self.run.num_steps:
            measure_validation(self.run)


def measure_validation(run: Run) -> None:
    """Validate, if text is held out, and keep the result for this step's log line. Every rank must call this."""
    if run.validation is None:
        return
    validation = validate(run)
    run.progress.validation_loss = validation.loss
    run.progress.validated_step = run.progress.step
    details: dict[str, Any] = {
        "loss": validation.loss,
        "perplexity": validation.perplexity,
        "tokens": validation.tokens,
    }
    if validation.accuracy is not None:
        run.progress.validation_accuracy = validation.accuracy.token_accuracy
        run.progress.validation_row_accuracy = validation.accuracy.row_accuracy
        details["accuracy"] = validation.accuracy.to_event()
    run.validation_metrics = describe_sources(validation)
    run.record_event("validation", **details, **run.validation_metrics)


def describe_sources(validation: Validation) -> dict[str, Any]:
    """What else a validation found, as lines of metrics.jsonl have it; nothing of a synthetic task.

    The loss in bits a byte and by source, and what depths of multi-token prediction foresaw, where the model has some.
    """
    if not validation.by_source:
        return {}
    bits = validation.bits_per_byte
    accepted = {"mtp_accepted": list(validation.mtp_accepted)} if validation.mtp_accepted else {}
    return {
        "validation_bits_per_byte": None if bits is None else finite(bits),
        "validation_by_source": {name: finite(source.loss) for name, source in validation.by_source.items()},
        **accepted,
    }
