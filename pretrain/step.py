"""One optimizer step: several backward passes over micro-batches, one reduction, one move of the weights."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data_pipeline.batch import Batch
from model.config.pattern import mixer_name
from model.config.schema import ModelConfig
from model.hybrid import ModelOutput
from model.moe.balance import auxiliary_names
from pretrain.micro_batch import LossShare, MicroBatch, move_batch
from pretrain.monitor.anomalies import StepAnomaly, describe_skip, judge_loss, remember_loss
from pretrain.parallel import Parallel
from pretrain.run import Run


@dataclass(frozen=True)
class StepResult:
    """What a step gives to the log, alike on all ranks but for `busy_seconds`: reading and computing, without waiting.

    `signal`: a stop asked for on any rank, 0 for none.
    """

    loss: float
    tokens: int
    sequence_length: int
    auxiliary: dict[str, float]
    expert_counts: dict[int, list[int]]
    grad_norm: float
    applied: bool
    learning_rate: float
    seconds: float
    signal: int
    busy_seconds: float
    trouble: StepAnomaly | None = None
    skip: dict[str, Any] | None = None


@dataclass
class StepSums:
    """Sums over this rank's micro-batches, then over all ranks: everything a step reports, in one reduction.

    Every rank holds the same keys, those of the whole model, though its own blocks may give only some.
    """

    nll: Tensor
    z_loss: Tensor
    auxiliary: dict[str, Tensor] = field(default_factory=dict)
    expert_counts: dict[int, Tensor] = field(default_factory=dict)

    def add(self, output: ModelOutput) -> None:
        """Add one micro-batch; waits for nothing."""
        if output.loss is not None:
            self.nll += output.loss.nll_sum
            self.z_loss += output.loss.total.detach() - output.loss.nll_sum
        for name, value in output.auxiliary.items():
            self.auxiliary[name] += value.detach()
        for block, counts_E in output.expert_counts.items():
            self.expert_counts[block] += counts_E

    def reduce(self, parallel: Parallel, signal: int) -> int:
        """Sum over all ranks that saw other tokens or blocks, in float64, which holds counts exactly.

        Returns the agreed signal. Every rank must call this.
        """
        names, blocks = list(self.auxiliary), list(self.expert_counts)
        parts = [self.nll, self.z_loss, *(self.auxiliary[name] for name in names)]
        vectors = [torch.stack([part.double() for part in parts])]
        vectors += [self.expert_counts[block].double() for block in blocks]
        joined = parallel.all_reduce_unique(torch.cat(vectors))
        scalars, *counts = joined.split([len(vector) for vector in vectors])
        self.nll, self.z_loss = scalars[0], scalars[1]
        self.auxiliary = dict(zip(names, scalars[2:]))
        self.expert_counts = {block: values.to(torch.int64) for block, values in zip(blocks, counts)}
        return parallel.max_over_all(signal)


def train_step(run: Run) -> StepResult:
    """Take the next global batch, accumulate its gradients, step. Every rank must call this.

    The loss is the sum over tokens divided by the valid tokens of the global batch; auxiliary losses are means over its
    micro-batches. Neither depends on how the batch is cut into micro-batches and ranks.
    """
    start = time.perf_counter()
    stage, progress, engine = run.stage, run.progress, run.engine
    run.heartbeat.at(progress.step + 1, "data")
    global_batch_size = stage.batch_size(progress.step + 1)
    sequence_length = run.loader.sequence_length
    batches = run.loader.take(global_batch_size, stage.micro_batch_size)
    num_micro_batches = global_batch_size // stage.micro_batch_size
    read = time.perf_counter()
    valid_tokens = max(1, count_valid_tokens(batches, run.parallel))
    waited_seconds = time.perf_counter() - read
    sums = empty_sums(run.config.model, run.parallel.device)
    losses: list[Tensor] = []
    engine.module.train()
    with engine.accumulate(len(batches)):
        micro_batches = [move_batch(batch, run.parallel) for batch in batches]
        for output in forward_backward(run, micro_batches, LossShare(valid_tokens, num_micro_batches)):
            sums.add(output)
            if output.loss is not None:
                losses.append(output.loss.total.detach() / valid_tokens)
        run.heartbeat.at(progress.step + 1, "reduce")
        busy_seconds = time.perf_counter() - start - waited_seconds
        signal = sums.reduce(run.parallel, run.signals.received)
        loss = float(sums.nll) / valid_tokens
        trouble = judge_loss(loss, progress.recent_losses, run.config.health)
        if trouble is not None and run.config.health.on_spike == "skip":
            engine.skip_next_step()
    rate = stage.rate(progress.step + 1)
    run.heartbeat.at(progress.step + 1, "optimizer")
    outcome = engine.step(rate)
    skip = None
    if outcome.applied:
        run.model.update_expert_bias(sums.expert_counts)
        progress.skipped_in_row = 0
        remember_loss(loss, progress.recent_losses, run.config.health)
    else:
        trouble = trouble or StepAnomaly("nonfinite", "gradients are not finite")
        skip = describe_skip(run.parallel, batches, [float(loss) for loss in losses], engine.fault)
        progress.skipped_in_row += 1
        progress.skipped_steps += 1
    progress.step += 1
    progress.tokens += global_batch_size * sequence_length
    auxiliary = {name: float(value) / num_micro_batches for name, value in sums.auxiliary.items()}
    if run.config.model.logits_z_loss_weight > 0:
        auxiliary["logits_z"] = float(sums.z_loss) / valid_tokens
    return StepResult(
        loss=loss,
        tokens=global_batch_size * sequence_length,
        sequence_length=sequence_length,
        auxiliary=auxiliary,
        expert_counts={block: counts_E.tolist() for block, counts_E in sums.expert_counts.items()},
        grad_norm=outcome.grad_norm,
        applied=outcome.applied,
        learning_rate=rate,
        seconds=time.perf_counter() - start,
        signal=signal,
        busy_seconds=busy_seconds,
        trouble=trouble,
        skip=skip,
    )


def empty_sums(config: ModelConfig, device: torch.device) -> StepSums:
    """Nothing added yet, for all blocks of the model."""
    zero = torch.zeros((), device=device)
    sums = StepSums(zero.clone(), zero.clone())
    letters = config.letters
    for name in filter(None, map(mixer_name, letters)):
        sums.auxiliary |= {loss: zero.clone() for loss in getattr(config.mixers, name).auxiliary_names()}
    blocks = [index for index, letter in enumerate(letters) if letter == "E"]
    if config.moe is not None and blocks:
        sums.auxiliary |= {name: zero.clone() for name in auxiliary_names(config.moe)}
        sums.expert_counts = {
            block: torch.zeros(config.moe.num_experts, dtype=torch.int64, device=device) for block in blocks
        }
    return sums


def forward_backward(run: Run, micro_batches: Sequence[MicroBatch], share: LossShare) -> Iterator[ModelOutput]:
    """Forward and backward of each micro-batch inside `accumulate`, and what this rank's blocks gave.

    With pipeline stages a rank gives an output for each of its pieces, and a loss on the last stage alone.
    """

    def scaled_share(output: ModelOutput) -> Tensor | None:
        run.heartbeat.at(run.progress.step + 1, "forward")
        part = share.of(output)
        return None if part is None else run.engine.scale(part)

    if run.pipeline is not None:
        yield from run.pipeline.train(micro_batches, scaled_share)
        return
    for micro_batch in micro_batches:
        run.heartbeat.at(run.progress.step + 1, "forward")
        output = forward_micro_batch(run, micro_batch)
        loss = share.of(output)
        assert loss is not None, "a batch has labels"
        run.engine.backward(loss)
        yield output


@torch.no_grad()
def forward_only(run: Run, micro_batches: Sequence[MicroBatch], *, predicts: bool = False) -> Iterator[ModelOutput]:
    """The outputs of the micro-batches, without gradients; with the most likely tokens if asked for."""
    if run.pipeline is not None:
        yield from run.pipeline.evaluate(micro_batches, predicts=predicts)
        return
    for micro_batch in micro_batches:
        yield forward_micro_batch(run, micro_batch, predicts=predicts)


def forward_micro_batch(run: Run, given: MicroBatch, *, predicts: bool = False) -> ModelOutput:
    """Loss, auxiliary losses and expert counts of one micro-batch, through the whole model."""
    output: ModelOutput = run.engine.forward(given.tokens_BT, given.meta, given.labels_BT, predicts=predicts)
    return output


def count_valid_tokens(batches: Sequence[Batch], parallel: Parallel) -> int:
    """Labels that count, over all micro-batches of all data ranks. Every data rank must call this."""
    own = sum(int(batch.loss_mask_BT.sum()) for batch in batches)
    return int(parallel.sum_over_data(torch.tensor(own, dtype=torch.int64, device=parallel.device)))
