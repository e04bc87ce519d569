"""The log of a step: its line of metrics, the display, slow ranks and collapsed experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from amfm.data_pipeline.loader.loader import SourceUse
from amfm.model.flops import flops_per_token
from amfm.pretrain.hook import Hook
from amfm.pretrain.monitor.environment import read_peak_memory
from amfm.pretrain.monitor.experts import EXPERT_STEPS, find_collapsed
from amfm.pretrain.monitor.metrics import finite
from amfm.pretrain.monitor.stragglers import STRAGGLER_STEPS
from amfm.pretrain.pruning.prune import number_pruned
from amfm.pretrain.run import Run
from amfm.pretrain.stages import is_due
from amfm.pretrain.step_sums import StepResult


class Metrics(Hook):
    """Logs every step, also one that ends the run."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def after_step(self, result: StepResult) -> None:
        """Log the step."""
        record(self.run, result)


def record(run: Run, result: StepResult) -> None:
    """Log a step: its line of metrics, the display, the event of a skip, and now and then the slow ranks.

    Every rank must call this.
    """
    metrics = describe_step(run, result)
    if run.log is not None:
        run.log.write_metrics(metrics)
    if run.display is not None:
        run.display.show(metrics)
    if result.skip is not None and result.anomaly is not None:
        run.record_event("skipped_step", cause=result.anomaly.text, in_row=run.progress.skipped_in_row, **result.skip)
        run.say(f"step {run.progress.step}: {result.anomaly.text}; the step was skipped on every rank")
    run.stragglers.add(result.busy_seconds)
    if is_due(run.progress.step, STRAGGLER_STEPS):
        report_stragglers(run)
    if is_due(run.progress.step, EXPERT_STEPS):
        report_collapse(run, result)


def describe_step(run: Run, result: StepResult) -> dict[str, Any]:
    """Build the step's line of metrics.jsonl; NaN and infinities become null, because JSON has no word for them.

    `mfu`: model FLOPs, without those of recomputation, over the peak of all ranks. `expert_load`: tokens of the fullest
    expert over the mean, for each MoE block. `mtp_loss`: of each depth of multi-token prediction. `memory_bytes`: the main rank's peak so far. `damaged_samples`: of the run so far,
    where there are any.
    """
    tokens_per_second = result.tokens / result.seconds
    flops = sum(flops_per_token(run.model.config, result.sequence_length).values())
    metrics: dict[str, Any] = {
        "step": run.progress.step,
        "loss": finite(result.loss),
        "grad_norm": finite(result.grad_norm),
        "lr": result.learning_rate,
        "tokens": run.progress.tokens,
        "tokens_per_second": tokens_per_second,
        "mfu": tokens_per_second * flops / run.peak.flops_per_second,
        "seconds": result.seconds,
        "auxiliary": {name: finite(value) for name, value in result.auxiliary.items()},
        "expert_load": {
            str(block): max(counts) * len(counts) / max(1, sum(counts))
            for block, counts in result.expert_counts.items()
        },
        "memory_bytes": read_peak_memory(run.parallel.device),
        "data": describe_data(run.loader.ledger()),
        "skipped": not result.applied,
    }
    if result.mtp_losses:
        metrics["mtp_loss"] = [finite(loss) for loss in result.mtp_losses]
    if result.damaged_samples:
        metrics["damaged_samples"] = result.damaged_samples
    if run.progress.validated_step == run.progress.step:
        loss = run.progress.validation_loss
        metrics["validation_loss"] = None if loss is None else finite(loss)
        metrics |= run.validation_metrics
        if run.progress.validation_accuracy is not None:
            metrics["validation_accuracy"] = run.progress.validation_accuracy
            metrics["validation_row_accuracy"] = run.progress.validation_row_accuracy
    if run.tasks_step == run.progress.step and run.task_values:
        metrics["tasks"] = run.task_values
    if run.config.stages:
        metrics["stage"] = run.stage.name
    return metrics


def describe_data(ledger: Sequence[SourceUse]) -> dict[str, Any]:
    """Summarise data use for the log: tokens of each source in the newest phase, and its epochs since the run began."""
    newest = [line for line in ledger if line.phase == ledger[-1].phase]
    return {
        "phase": ledger[-1].phase,
        "tokens": {line.source: line.tokens for line in newest},
        "epochs": {line.source: line.epochs for line in newest},
    }


def report_stragglers(run: Run) -> None:
    """Log the ranks that compute much longer than the median. Every rank must call this."""
    percent = run.config.health.straggler_percent
    slow = run.stragglers.find(run.parallel, percent)
    if slow:
        run.record_event("stragglers", ranks=[asdict(entry) for entry in slow])
        run.say(f"step {run.progress.step}: slower than the median: " + ", ".join(str(entry) for entry in slow))


def report_collapse(run: Run, result: StepResult) -> None:
    """Log the MoE blocks in which the same experts now take nearly every token, once until they recover."""
    moe, section = run.config.model.moe, run.config.prune
    pruned = 0
    if moe is not None and section is not None and section.groups == "experts":
        pruned = number_pruned(section, run.progress.step - 1, moe.num_experts)
    # Those that pruning took have no token, and are none to be missed.
    living = {block: sorted(counts)[pruned:] for block, counts in result.expert_counts.items()}
    shares = {} if moe is None else find_collapsed(living, moe.top_k)
    if shares.keys() - run.collapsed_blocks:
        run.record_event("experts_collapsed", token_share={str(block): share for block, share in shares.items()})
        blocks = ", ".join(f"{block} ({share:.0%} of tokens)" for block, share in shares.items())
        run.say(
            f"warning: step {run.progress.step}: the same experts take nearly every token in block {blocks}; see "
            "model.moe.expert_bias, bias_update_rate (2e-2 for runs below about 1,000 steps) and auxiliary_loss_weight"
        )
    run.collapsed_blocks = frozenset(shares)
