"""One optimizer step: forward and backward of every micro-batch, one reduction of gradients, one update of the weights.

The loss of a step is a mean over the valid tokens of its whole global batch. How many those are is asked of all data
ranks before the first forward pass, so every micro-batch's loss can be divided at once, and gradients are only ever
summed: over micro-batches, over ranks that hold parts of them, and over data ranks (engine/engine.py draws the way).
Whichever way the global batch is cut into micro-batches and ranks, the sum is the same.

Nothing waits for the device before the last backward pass is queued: losses, counts and auxiliary losses add up in
device tensors (`StepSums`) and cross to the host once, in one reduction over all ranks, together with the signal that
any rank may have received.

Layers that depend on the step are set before its first forward pass, as a function of only the seed and the step, the same on
all ranks: there is nothing to save, and a resumed run continues with what an uninterrupted one has.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from amfm.data_pipeline.batch import Batch
from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel, ModelOutput
from amfm.model.loss import IGNORE_INDEX
from amfm.model.parallel.groups import opened
from amfm.pretrain.engine.engine import StepOutcome
from amfm.pretrain.micro_batch import LossShare, MicroBatch, MicroBatches, send, shift_batch
from amfm.pretrain.monitor.anomalies import StepAnomaly, describe_skip, explain_refusal, judge_loss, remember
from amfm.pretrain.parallel import Parallel
from amfm.pretrain.run import Run
from amfm.pretrain.step_sums import RankStatus, StepReport, StepResult, StepSums, empty_sums


def train_step(run: Run) -> StepResult:
    """Train on the next global batch: accumulate its gradients, update the weights, advance `progress`.

    Where rows of spread experts had less room than a router filled, that is done twice (model/parallel/groups.py).

    Every rank must call this. A loss spike under `health.on_spike=skip` poisons the gradients before the update, and
    non-finite gradients do not change the weights; either way all ranks skip together.
    """
    work = StepWork.begin(run)
    with run.clock("data"):
        batches = run.loader.take(work.num_rows, work.micro_rows)
    run.clock("count")
    counts = count_valid_tokens(batches, run.parallel, run.config.model)
    share = LossShare.of_counts(counts, work.num_micro_batches, run.config.model)
    run.engine.module.train()
    set_step(run.model, run.progress.step, run.num_steps)
    sums, report, anomaly = accumulate_gradients(run, batches, counts, share)
    capacity = run.parallel.groups.row_capacity
    if capacity is not None and capacity.count_missed(report.missed):
        run.engine.step(work.rate)  # rejected on all ranks: it lets go of the gradients
        run.tell("dispatch_overflow", "expert buffers overflowed: this step is computed again with exact counts")
        sums, report, anomaly = accumulate_gradients(run, batches, counts, share)
        capacity.count_missed(report.missed)
    for hook in run.hooks:
        hook.before_update()
    run.clock("optimizer")
    outcome = run.engine.step(work.rate)
    skip = None
    if outcome.applied:
        # Only after a step that counts, and from counts of all ranks, so that every copy of the bias moves alike.
        run.model.update_expert_bias(sums.expert_counts)
    else:
        anomaly = anomaly or explain_refusal(run.engine.take_refusal())
        losses = [float(loss / share.valid_tokens) for loss in sums.micro_losses]
        skip = describe_skip(run.parallel, batches, losses, run.engine.fault)
    return conclude(run, work, report, outcome, anomaly, skip)


def accumulate_gradients(
    run: Run, batches: Sequence[Batch], counts: Tensor, share: LossShare
) -> tuple[StepSums, StepReport, StepAnomaly | None]:
    """Forward and backward of a step's micro-batches: what they summed up, what that says, and whether it is a spike.

    Gradients are reduced, and poisoned where the step is not to move anything: after a spike that `health.on_spike` skips, and
    where rows of spread experts had no room. `counts`: of valid tokens. Every rank must call this.
    """
    sums = empty_sums(run.config.model, run.parallel.device, extra=run.config.own_losses())
    capacity = run.parallel.groups.row_capacity
    with run.engine.accumulate(len(batches)):
        micro_batches = MicroBatches(batches, run.parallel, run.config.model)
        for hook in run.hooks:
            hook.before_passes(micro_batches, share)
        with run.clock("forward"), opened(capacity):
            for output in forward_backward(run, micro_batches, share):
                sums.add(output)
        run.clock("reduce")
        # Still inside `accumulate`: a step to be skipped must be poisoned before gradients are reduced.
        report = sums.reduce(run.parallel, counts, gather_status(run))
        anomaly = judge_loss(report.loss, run.progress.recent_losses, run.config.health)
        is_spike = anomaly is not None and run.config.health.on_spike == "skip"
        if is_spike or (capacity is not None and capacity.was_short(report.missed)):
            run.engine.skip_next_step()
    return sums, report, anomaly


@dataclass(frozen=True)
class StepWork:
    """What a step is to do: rows of the global batch and of a micro-batch, their length, and the learning rate.

    started: when it began, by `time.perf_counter`.
    """

    num_rows: int
    micro_rows: int
    sequence_length: int
    rate: float
    started: float

    @classmethod
    def begin(cls, run: Run) -> StepWork:
        """The work of the next step, which begins now."""
        stage, step = run.stage, run.progress.step + 1
        rows, length = stage.batch_size(step), run.loader.sequence_length
        return cls(rows, stage.train.micro_batch_size, length, stage.rate(step), time.perf_counter())

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of all data ranks."""
        return self.num_rows // self.micro_rows

    @property
    def num_tokens(self) -> int:
        """Tokens of the global batch."""
        return self.num_rows * self.sequence_length


def conclude(
    run: Run,
    work: StepWork,
    report: StepReport,
    outcome: StepOutcome,
    anomaly: StepAnomaly | None,
    skip: dict[str, Any] | None,
) -> StepResult:
    """Advance `progress` by a step, skipped or not, and put together what it reports."""
    progress = run.progress
    if outcome.applied:
        progress.skipped_in_row = 0
        remember(report.loss, progress.recent_losses, run.config.health)
        remember(outcome.grad_norm, progress.recent_norms, run.config.health)
    else:
        progress.skipped_in_row += 1
        progress.skipped_steps += 1
    # A skipped step advances too: schedule, stages and data are functions of the step.
    progress.step += 1
    progress.tokens += work.num_tokens
    set_step(run.model, progress.step, run.num_steps)  # for what is measured between steps
    return StepResult(
        loss=report.loss,
        tokens=work.num_tokens,
        sequence_length=work.sequence_length,
        auxiliary=report.mean_auxiliary(run.config.model, work.num_micro_batches),
        expert_counts=report.expert_counts,
        grad_norm=outcome.grad_norm,
        applied=outcome.applied,
        learning_rate=work.rate,
        seconds=time.perf_counter() - work.started,
        signal=report.status.signal,
        is_saving=report.status.is_saving,
        busy_seconds=run.phases.busy_seconds(),
        anomaly=anomaly,
        skip=skip,
        damaged_samples=damaged_before(run) + report.status.damaged_samples,
        mtp_losses=report.depth_losses(),
    )


def gather_status(run: Run) -> RankStatus:
    """What only this rank knows, for the reduction at the end of a step."""
    damaged = len(run.loader.quarantined) - damaged_before(run) if reports_damage(run) else 0
    return RankStatus(run.signals.received, run.saver.is_writing(), damaged)


def reports_damage(run: Run) -> bool:
    """Whether samples may be read as rows without labels."""
    return run.config.data.on_corruption == "quarantine"


def damaged_before(run: Run) -> int:
    """Samples of all ranks that were damaged when this start began: a checkpoint joins them."""
    return run.loader.num_quarantined_at_load if reports_damage(run) else 0


def forward_backward(run: Run, micro_batches: Sequence[MicroBatch], share: LossShare) -> Iterator[ModelOutput]:
    """Run forward and backward of each micro-batch, inside `engine.accumulate`, and yield the outputs.

    With a pipeline a rank yields one output for each micro-batch and each piece of the model it holds; a loss is in
    those of only the last piece.
    """

    def scaled_share(output: ModelOutput) -> Tensor | None:
        run.clock("forward")
        part = share.apply(output)
        return None if part is None else run.engine.scale(part)

    if run.pipeline is not None:
        yield from run.pipeline.train(micro_batches, scaled_share)
        return
    for micro_batch in micro_batches:
        run.clock("forward")
        output = forward_micro_batch(run, micro_batch)
        loss = share.apply(output)
        assert loss is not None, "a batch has labels"
        run.engine.backward(loss)
        yield output


@torch.no_grad()
def forward_only(run: Run, micro_batches: Sequence[MicroBatch], *, predicts: bool = False) -> Iterator[ModelOutput]:
    """Run the micro-batches without gradients and yield the outputs; `predicts`: with the most likely tokens."""
    if run.pipeline is not None:
        yield from run.pipeline.evaluate(micro_batches, predicts=predicts)
        return
    for micro_batch in micro_batches:
        yield forward_micro_batch(run, micro_batch, predicts=predicts)


def forward_micro_batch(run: Run, given: MicroBatch, *, predicts: bool = False) -> ModelOutput:
    """Run one micro-batch through the whole model: loss, auxiliary losses and expert counts."""
    output: ModelOutput = run.engine.forward(
        given.tokens_BT, given.meta, given.labels_BT, predicts=predicts, ahead=given.ahead
    )
    return output


def count_valid_tokens(batches: Sequence[Batch], parallel: Parallel, model: ModelConfig) -> Tensor:
    """Count the labels that are not masked, over all micro-batches of all data ranks. Every rank must call this.

    First those of the main loss, then those of each MTP layer; on the device, if no one waits.
    """
    own = [sum(int(batch.loss_mask_BT.sum()) for batch in batches)]
    ahead = [shift_batch(batch, model.num_depths) for batch in batches]
    own += [
        sum(int((given[depth].labels_BT != IGNORE_INDEX).sum()) for given in ahead) for depth in range(model.num_depths)
    ]
    return parallel.sum_over_data(send(torch.tensor(own, dtype=torch.int64), parallel.device))


@runtime_checkable
class Scheduled(Protocol):
    """A module that depends on the step."""

    def set_step(self, step: int, total_steps: int, seed: int) -> None:
        """Prepare for the step that follows `step` steps of `total_steps`. No collectives."""


def set_step(model: HybridModel, step: int, total_steps: int) -> None:
    """Prepare every module of a model that depends on the step, after `step` steps of `total_steps`. No collectives."""
    for module in model.modules():
        if isinstance(module, Scheduled):
            module.set_step(step, total_steps, model.seed)
