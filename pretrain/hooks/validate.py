"""Validation: loss on held-out text, whole and by source, and the accuracy where the data is a synthetic task.

Measured on the run's own layout of ranks, with the batch and sequence length of its stage, so that losses of training and
validation compare. The loader starts at its first sample each time: two validations of a run see the same rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from amfm.data_pipeline.batch import Batch
from amfm.data_pipeline.loader.loader import PretrainLoader
from amfm.data_pipeline.samples.samples import NoRowsError
from amfm.data_pipeline.store.store import TokenStore
from amfm.model.loss import IGNORE_INDEX
from amfm.pretrain.hook import Hook
from amfm.pretrain.micro_batch import move_batch
from amfm.pretrain.monitor.metrics import finite
from amfm.pretrain.parallel import Parallel
from amfm.pretrain.run import Run
from amfm.pretrain.scores import (
    Accuracy,
    SourceLoss,
    bits_per_byte,
    count_correct,
    losses_of,
    measure_accuracy,
    sum_by_source,
)
from amfm.pretrain.stages import data_of_stages, is_due
from amfm.pretrain.startup.data import open_validations
from amfm.pretrain.step import count_valid_tokens, forward_only
from amfm.pretrain.step_sums import StepResult, empty_sums


@dataclass(frozen=True)
class Validation:
    """Mean negative log-likelihood per token in nats, on how many tokens, and the accuracy on a synthetic task.

    bits_per_byte, by_source: only of text; by_source names the sources that these rows came from. mtp_accepted: for
    each MTP layer, how often its most likely token is the one that follows.
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


def validate(run: Run, loader: PretrainLoader, num_rows: int | None = None) -> Validation:
    """Measure loss and accuracy on the first rows of held-out text; None: `train.validation_batches` global batches.

    The same text each time; rows of the last batch beyond `num_rows` do not count. Does not change weights, gradients, random state or the training data's cursor. Every rank
    must call this.
    """
    loader.seek(0)
    model = run.config.model
    sums = empty_sums(model, run.parallel.device)
    is_synthetic = run.config.data.synthetic is not None
    counts = torch.zeros(1 + model.num_depths, dtype=torch.int64, device=run.parallel.device)
    hits_D = torch.zeros(model.num_depths, dtype=torch.float64, device=run.parallel.device)
    batch_rows = run.stage.train.global_batch_size
    num_batches = run.config.train.validation_batches if num_rows is None else math.ceil(num_rows / batch_rows)
    counts_R2 = torch.zeros(num_batches * batch_rows, 2, dtype=torch.float64, device=run.parallel.device)
    names = loader.source_names
    sources_S2 = torch.zeros(len(names), 2, dtype=torch.float64, device=run.parallel.device)
    run.engine.module.eval()
    for _ in range(num_batches):
        run.clock("validate")  # each batch is progress, however many there are
        batches = loader.take(batch_rows, run.stage.train.micro_batch_size)
        if num_rows is not None:
            leave_out(batches, num_rows)
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
    store = loader.store
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


def leave_out(batches: Sequence[Batch], num_rows: int) -> None:
    """Mask all labels of rows that come after the first `num_rows`, in place."""
    for batch in batches:
        for row, sample in enumerate(batch.sample_ids):
            if sample >= num_rows:
                batch.labels_BT[row] = IGNORE_INDEX
                batch.loss_mask_BT[row] = False


def accepted_parts(hits_D: torch.Tensor, tokens: Sequence[int], parallel: Parallel) -> tuple[float, ...]:
    """The part of its labels that each depth finds most likely; empty without depths. Every rank must call this."""
    if not tokens:
        return ()
    return tuple(hits / max(1, count) for hits, count in zip(parallel.all_reduce_unique(hits_D).tolist(), tokens))


class Validations(Hook):
    """Validates when that is due, and adds what it finds to the step's line. Holds the loaders, by length of rows."""

    def __init__(self, run: Run) -> None:
        self.run = run
        data = data_of_stages(run.config, run.stages)
        self.loaders: dict[int, PretrainLoader] = {}
        self.left_out: str | None = None
        try:
            self.loaders = open_validations(run.config, data, run.parallel, run.stages)
        except NoRowsError as error:
            # A run that asks for no validation loses the one at its end, not itself. All ranks read the same store.
            if run.config.train.validate_every_steps is not None:
                raise
            self.left_out = str(error)

    def at_start(self) -> None:
        """Report that the validation at the end is left out, and why."""
        if self.left_out is not None:
            self.run.tell(
                "not_validated", f"the validation at the end is left out: {self.left_out}", text=self.left_out
            )

    @property
    def loader(self) -> PretrainLoader | None:
        """Loader of held-out text in rows of the present stage's length; None if nothing is held out."""
        return self.loaders.get(self.run.stage.train.sequence_length)

    def after_step(self, result: StepResult) -> None:
        """Validate each `train.validate_every_steps`, and after the last step."""
        run, step, loader = self.run, self.run.progress.step, self.loader
        if loader is None or not (is_due(step, run.config.train.validate_every_steps) or step == run.num_steps):
            return
        began = time.perf_counter()
        validation = validate(run, loader)
        result.found["validation_seconds"] = time.perf_counter() - began
        run.progress.validation_loss = validation.loss
        run.progress.validated_step = step
        facts: dict[str, Any] = {
            "loss": validation.loss,
            "perplexity": validation.perplexity,
            "tokens": validation.tokens,
        }
        result.found["validation_loss"] = finite(validation.loss)
        if validation.accuracy is not None:
            found = validation.accuracy
            run.progress.validation_accuracy = found.token_accuracy
            run.progress.validation_row_accuracy = found.row_accuracy
            facts["accuracy"] = found.to_event()
            result.found["validation_accuracy"] = found.token_accuracy
            result.found["validation_row_accuracy"] = found.row_accuracy
        sources = describe_sources(validation)
        result.found.update(sources)
        run.record_event("validation", **facts, **sources)

    def close(self) -> None:
        """Close the loaders."""
        for loader in self.loaders.values():
            loader.close()


def describe_sources(validation: Validation) -> dict[str, Any]:
    """What else a validation found, as lines of metrics.jsonl have it; nothing of a synthetic task.

    The loss in bits per byte and by source, and the acceptance rate of each MTP layer.
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
