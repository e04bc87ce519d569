"""The training loop, from a configuration to a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from data_pipeline.loader.loader import SourceUse
from model.flops import flops_per_token
from pretrain.config.schema import RunConfig
from pretrain.failures import describe, is_bug, while_running
from pretrain.launcher_protocol import DONE, RUN_FAILED
from pretrain.monitor.anomalies import StepAnomaly, too_many_skips
from pretrain.monitor.heartbeat import describe_lost
from pretrain.monitor.signals import SignalWatch, signal_name
from pretrain.monitor.stragglers import STRAGGLER_STEPS
from pretrain.run import Run, apply_stage
from pretrain.saving import finish_saving, restore_newest_weights, save
from pretrain.start import close_run, start_run
from pretrain.step import StepResult, train_step
from pretrain.validate import validate


def train(config: RunConfig) -> int:
    """Train, resuming by itself from `run.dir`, and return the exit code. Every rank must call this.

    0: the steps asked for are done, or a signal asked to stop, and everything is saved. 3: too many steps in a row had
    gradients that are not finite; the newest checkpoint stands. Raises ValueError for settings and data that do not
    fit, OSError while it starts, RuntimeError for the machine's state and for all that ends a run under way; where another
    rank is gone, the message names it.
    """
    with SignalWatch() as signals:
        run = start_run(config, signals)
        with while_running():
            try:
                with while_running():
                    return run_steps(run)
            except RuntimeError as error:
                text = record_failure(run, str(error))
                if is_bug(error) or text == str(error):
                    raise
                raise RuntimeError(text) from error
            finally:
                close_run(run)


def record_failure(run: Run, text: str) -> str:
    """Write down why a run ends, with the ranks that are gone, and return what to say; a full disk must not hide it."""
    lost = describe_lost(run.heartbeat.find_lost(run.parallel.world_size))
    text = f"{lost}: {text}" if lost else text
    try:
        run.record_event("failed", error=text)
    except OSError as error:
        return f"{text} (nor could this be written down: {describe(error)})"
    return text


def run_steps(run: Run) -> int:
    """Step until the run is over, and say why it is."""
    train, steps = run.config.train, run.num_steps
    while run.progress.step < run.last_step:
        apply_stage(run)
        result = train_step(run)
        step = run.progress.step
        if is_due(step, train.validate_every_steps) or step == steps:
            measure_validation(run)
        record(run, result)
        if result.trouble is not None and not handle_anomaly(run, result.trouble):
            return RUN_FAILED
        if result.signal:
            return stop_on_signal(run, result.signal)
        if is_due(step, train.checkpoint_every_steps):
            save(run)
    save(run)
    finish_saving(run)
    finished = run.progress.step >= steps
    run.record_event("end", reason="finished" if finished else "stop_after_steps")
    run.say(f"{'finished' if finished else 'stopped'} at step {run.progress.step} of {steps}; saved")
    return DONE


def is_due(step: int, every_steps: int | None) -> bool:
    """Whether something that happens each so many steps happens after this one."""
    return every_steps is not None and step % every_steps == 0


def measure_validation(run: Run) -> None:
    """Validate, if there is text for it, and remember the loss for this step's line. Every rank must call this."""
    if run.validation is None:
        return
    run.heartbeat.at(run.progress.step, "validate")
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
    run.record_event("validation", **details)


def record(run: Run, result: StepResult) -> None:
    """Write the step's line, show it, and write down a skip."""
    metrics = describe_step(run, result)
    if run.log is not None:
        run.log.write_metrics(metrics)
    if run.display is not None:
        run.display.show(metrics)
    if result.skip is not None and result.trouble is not None:
        run.record_event("skipped_step", cause=result.trouble.text, in_row=run.progress.skipped_in_row, **result.skip)
        run.say(f"step {run.progress.step}: {result.trouble.text}; the step was skipped on every rank")
    run.stragglers.add(result.busy_seconds)
    if is_due(run.progress.step, STRAGGLER_STEPS):
        report_stragglers(run)


def describe_step(run: Run, result: StepResult) -> dict[str, Any]:
    """The line of metrics.jsonl; a number that is not finite is null there, because JSON has no word for it."""
    tokens_per_second = result.tokens / result.seconds
    flops = sum(flops_per_token(run.config.model, result.sequence_length).values())
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
        "data": describe_data(run.loader.ledger()),
        "skipped": not result.applied,
    }
    if run.progress.validated_step == run.progress.step:
        metrics["validation_loss"] = run.progress.validation_loss
        if run.progress.validation_accuracy is not None:
            metrics["validation_accuracy"] = run.progress.validation_accuracy
            metrics["validation_row_accuracy"] = run.progress.validation_row_accuracy
    if run.config.stages:
        metrics["stage"] = run.stage.name
    return metrics


def describe_data(ledger: Sequence[SourceUse]) -> dict[str, Any]:
    """The ledger at the newest phase: tokens that each source gave in it, and its epochs since the run began."""
    newest = [line for line in ledger if line.phase == ledger[-1].phase]
    return {
        "phase": ledger[-1].phase,
        "tokens": {line.source: line.tokens for line in newest},
        "epochs": {line.source: line.epochs for line in newest},
    }


def finite(value: float) -> float | None:
    """The value, or None for NaN and infinities."""
    return value if abs(value) < float("inf") else None


def stop_on_signal(run: Run, number: int) -> int:
    """Save and end as a signal asked, on whichever rank it arrived."""
    save(run)
    finish_saving(run)
    run.record_event("signal", name=signal_name(number))
    run.say(f"{signal_name(number)}: saved at step {run.progress.step}; the same command goes on from there")
    return DONE


def handle_anomaly(run: Run, trouble: StepAnomaly) -> bool:
    """Do what the configuration says about a step that went wrong; False when the run must end. Every rank must call this."""
    policy = trouble.policy(run.config.health)
    if policy == "stop":
        return abort_run(run, f"{trouble.text} (health.on_{trouble.kind}=stop)")
    if policy == "rollback":
        return roll_back(run, trouble)
    if too_many_skips(run.progress.skipped_in_row, run.config.train.max_skipped_steps):
        limit = f"train.max_skipped_steps={run.config.train.max_skipped_steps}"
        return abort_run(run, f"{run.progress.skipped_in_row} steps in a row were skipped ({limit}): {trouble.text}")
    return True


def roll_back(run: Run, trouble: StepAnomaly) -> bool:
    """Take the weights of the newest checkpoint and go on after the data of the steps since; False when that is not left.

    The steps since then count as skipped: schedule, stages and data stay functions of the step. Every rank must call this.
    """
    progress, limit = run.progress, run.config.health.max_rollbacks
    if progress.rollbacks >= limit:
        return abort_run(run, f"{trouble.text}, after {limit} rollbacks (health.max_rollbacks)")
    back_at = restore_newest_weights(run)
    if back_at is None:
        return abort_run(run, f"{trouble.text}, and there is no checkpoint to go back to")
    progress.rollbacks += 1
    run.record_event("rolled_back", cause=trouble.text, weights_of_step=back_at, rollbacks=progress.rollbacks)
    run.say(
        f"step {progress.step}: {trouble.text}; back to the weights of step {back_at}, on with the data after step "
        f"{progress.step}"
    )
    save(run)
    return True


def abort_run(run: Run, cause: str) -> bool:
    """End a run that no longer learns; the newest checkpoint is from before the trouble or inside it, and stands."""
    finish_saving(run)
    run.record_event("gave_up", cause=cause, skipped_in_row=run.progress.skipped_in_row)
    run.say(
        f"{cause}; events.jsonl names the samples and parameters. Lower optimizer.learning_rate or check the data, then "
        "start again from the newest checkpoint"
    )
    return False


def report_stragglers(run: Run) -> None:
    """Write down which ranks compute much longer than the others. Every rank must call this."""
    percent = run.config.health.straggler_percent
    slow = run.stragglers.find(run.parallel, percent)
    if slow:
        run.record_event("stragglers", ranks=[asdict(entry) for entry in slow])
        run.say(f"step {run.progress.step}: slower than the median: " + ", ".join(str(entry) for entry in slow))
