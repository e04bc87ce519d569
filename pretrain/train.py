"""The training loop, from a configuration to a finished run.

`train` builds a run (start.py), steps it to its end (step.py) and closes it. Between steps the loop validates, measures
tasks, writes the log, saves (saving.py) and compares ranks.

Every rank runs the same lines. What one rank alone knows (a signal, a NaN, a damaged sample) is reduced or gathered inside
the step, before anything branches on it: ranks that branched differently would wait in different collectives.

A run resumes bit for bit because all that changes lies in four places, and each is in every checkpoint: `Progress`, the
loader's cursor, the engine and the random generators. Learning rate, batch size, stage and order of samples are functions
of the step, so the loop has no state of its own.

A step with non-finite gradients or a loss spike is a `StepAnomaly`. The step itself was skipped on every rank or applied
on every rank; `handle_anomaly` then goes on, goes back to the newest checkpoint's weights, or ends the run, as the
section `health` says.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from amfm.data_pipeline.loader.loader import SourceUse
from amfm.data_pipeline.progress import Waiting
from amfm.model.flops import flops_per_token
from amfm.model.scheduled import set_step
from amfm.pretrain.checks.ranks import describe_parallel
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.failures import describe, is_bug, while_running
from amfm.pretrain.forgetting import forget_if_due
from amfm.pretrain.hooks import build_hooks, call_hooks
from amfm.pretrain.launcher_protocol import DONE, INTERRUPTED, NEXT_LAYOUT, RUN_FAILED
from amfm.pretrain.measure_tasks import measure_tasks
from amfm.pretrain.monitor.anomalies import StepAnomaly, too_many_skips
from amfm.pretrain.monitor.environment import read_peak_memory
from amfm.pretrain.monitor.experts import EXPERT_STEPS, find_collapsed
from amfm.pretrain.monitor.heartbeat import describe_lost
from amfm.pretrain.monitor.signals import SignalWatch, signal_name
from amfm.pretrain.monitor.stragglers import STRAGGLER_STEPS
from amfm.pretrain.parallel import is_first_rank
from amfm.pretrain.pruning.prune import number_pruned, prune, prune_if_due
from amfm.pretrain.run import Run, apply_stage
from amfm.pretrain.saving import (
    finish_copies,
    finish_saving,
    replicate_if_due,
    restore_newest_weights,
    save,
    send_missing_copy,
)
from amfm.pretrain.stages import is_guided, stage_of
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.step import StepResult, train_step
from amfm.pretrain.validate import Validation, validate


def train(config: RunConfig) -> int:
    """Train, resuming by itself from `run.dir`, and return the exit code. Every rank must call this.

    4: the next stage has another layout, and everything is saved: the same command goes on in it.
    0: the steps asked for are done, or SIGTERM or SIGUSR1 asked to stop, and everything is saved. 130: Ctrl-C, saved.
    3: an anomaly ended the run (`handle_anomaly`), or `train.checkpoint_store` does not take its last checkpoint; the newest checkpoint stands. Raises ValueError for settings and data that do not
    fit, OSError while it starts, RuntimeError for the machine's state and for all that ends a run under way; where another
    rank is gone, the message names it.
    """
    with SignalWatch(announces=is_first_rank()) as signals:
        # Outside of `while_running`: what fails in the start may be a setting, and keeps that exit code.
        with Waiting("amfm train", speaks=is_first_rank()) as waiting:
            run = start_run(config, signals, waiting)
        with while_running():
            try:
                with while_running():
                    code = run_steps(run)
                    # It ended in order, so that what is to go on is on the disk.
                    for remark in [] if run.saver.replicas is None else run.saver.replicas.clear():
                        run.say(f"warning: {remark}")
                    return code
            except RuntimeError as error:
                text = record_failure(run, str(error))
                # A bug keeps its type and traceback, and an unchanged message needs no second error around it.
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
    """Step until the last step, a signal or an anomaly that ends the run; returns the exit code. Every rank must call this."""
    train, steps = run.config.train, run.num_steps
    hooks = build_hooks(run.config)
    send_missing_copy(run)
    while run.progress.step < run.last_step:
        if needs_fresh_start(run):
            return leave_for_fresh_start(run)
        apply_stage(run)
        with run.profiler.trace(run.progress.step + 1):
            result = train_step(run)
        step = run.progress.step
        set_step(run.model, step, run.num_steps)  # for what is measured between steps
        prune_if_due(run)
        forget_if_due(run)
        call_hooks(run, hooks)
        if run.state_watch is not None and is_due(step, run.config.health.check_state_every_steps):
            run.state_watch.examine(step)
        if is_due(step, train.validate_every_steps) or step == steps:
            measure_validation(run)
        if run.config.evaluate.tasks and (is_due(step, run.config.evaluate.every_steps) or step == steps):
            measure_tasks(run)
        # Logged before an anomaly may end the run or a rollback may save, so that each step has its line.
        record(run, result)
        if result.anomaly is not None and not handle_anomaly(run, result.anomaly):
            return RUN_FAILED
        if result.signal:
            return stop_on_signal(run, result.signal)
        if not result.is_saving:
            finish_saving(
                run
            )  # waits for nothing: a save that failed on any rank ends the run now, not at the next one
        if is_due(step, train.checkpoint_every_steps):
            save(run)
        elif not result.is_saving and step < run.last_step:
            replicate_if_due(run)
    save(run)
    finish_saving(run)
    if not finish_copies(run):
        return fail_without_copy(run)
    finished = run.progress.step >= steps
    run.record_event("end", reason="finished" if finished else "stop_after_steps")
    run.say(f"{'finished' if finished else 'stopped'} at step {run.progress.step} of {steps}; saved")
    return DONE


def fail_without_copy(run: Run) -> int:
    """End a run whose last checkpoint is in its directory alone, which may go with the machine; returns the exit code."""
    text = (
        f"the checkpoint of step {run.progress.step} is in {run.directory} and not in "
        f"train.checkpoint_store={run.config.train.checkpoint_store}; the same command sends it"
    )
    run.record_event("failed", error=text)
    run.say(text)
    return RUN_FAILED


def needs_fresh_start(run: Run) -> bool:
    """Whether the next step needs another layout than this run was built in, or a model without its guides."""
    has_guide = run.model.config.guide is not None
    has_left = stage_of(run.stages, run.progress.step).parallel != run.layout
    return has_left or has_guide != is_guided(run.config, run.progress.step)


def leave_for_fresh_start(run: Run) -> int:
    """Save and end where ranks must be built anew; returns the exit code. Every rank must call this."""
    save(run)
    finish_saving(run)
    # One that came since the last step's reduction, while this was saved, is nobody's after this process.
    (number,) = run.parallel.max_over_all([run.signals.received])
    if number:
        return stop_on_signal(run, number)
    stage = stage_of(run.stages, run.progress.step)
    if stage.parallel == run.layout:
        run.record_event("guide_removed")
        run.say(f"saved at step {run.progress.step}: the factored matrices go on without guides; ranks start anew")
        return NEXT_LAYOUT
    run.record_event("next_layout", stage=stage.name, parallel=stage.parallel.model_dump(mode="json"))
    run.say(
        f"saved at step {run.progress.step}: stage {stage.name} has a layout of its own, "
        f"{describe_parallel(stage.parallel)}; its ranks start anew"
    )
    return NEXT_LAYOUT


def is_due(step: int, every_steps: int | None) -> bool:
    """Whether something that is done every `every_steps` steps is due after this one; never, for None."""
    return every_steps is not None and step % every_steps == 0


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


def finite(value: float) -> float | None:
    """Replace NaN and infinities by None."""
    return value if abs(value) < float("inf") else None


def stop_on_signal(run: Run, number: int) -> int:
    """Save and end, because a signal asked any of the ranks to; returns the exit code. Every rank must call this."""
    save(run)
    finish_saving(run)
    run.record_event("signal", name=signal_name(number))
    run.say(f"{signal_name(number)}: saved at step {run.progress.step}; the same command goes on from there")
    return INTERRUPTED if number == signal.SIGINT else DONE


def handle_anomaly(run: Run, anomaly: StepAnomaly) -> bool:
    """Skip, roll back or stop after a step that went wrong, as `health` says; False when the run must end.

    Every rank must call this.
    """
    policy = anomaly.policy(run.config.health)
    if policy == "stop":
        return abort_run(run, f"{anomaly.text} (health.on_{anomaly.kind}=stop)")
    if policy == "rollback":
        return roll_back(run, anomaly)
    if too_many_skips(run.progress.skipped_in_row, run.config.train.max_skipped_steps):
        limit = f"train.max_skipped_steps={run.config.train.max_skipped_steps}"
        return abort_run(run, f"{run.progress.skipped_in_row} steps in a row were skipped ({limit}): {anomaly.text}")
    return True


def roll_back(run: Run, anomaly: StepAnomaly) -> bool:
    """Restore the newest checkpoint's weights and go on with the data after this step; False when that is not possible.

    The data that led here is not read again, and the steps since the checkpoint count as skipped, so that schedule, stages
    and data stay functions of the step. Saves at once: a restart must not meet the old data again. Every rank must call
    this.
    """
    progress, limit = run.progress, run.config.health.max_rollbacks
    if progress.rollbacks >= limit:
        return abort_run(run, f"{anomaly.text}, after {limit} rollbacks (health.max_rollbacks)")
    back_at = restore_newest_weights(run)
    if back_at is None:
        return abort_run(run, f"{anomaly.text}, and there is no checkpoint to go back to")
    # Counted in the saved progress, so that restarts cannot roll back for ever.
    progress.rollbacks += 1
    if run.config.prune is not None:
        prune(run, run.config.prune)  # the older weights may have fewer zeros
    run.record_event("rolled_back", cause=anomaly.text, weights_of_step=back_at, rollbacks=progress.rollbacks)
    run.say(
        f"step {progress.step}: {anomaly.text}; back to the weights of step {back_at}, on with the data after step "
        f"{progress.step}"
    )
    save(run)
    return True


def abort_run(run: Run, cause: str) -> bool:
    """Give up a run that no longer learns, saying what to do; the newest checkpoint stays. Every rank must call this."""
    finish_saving(run)
    run.record_event("gave_up", cause=cause, skipped_in_row=run.progress.skipped_in_row)
    run.say(
        f"{cause}; events.jsonl names the samples and parameters. Lower optimizer.learning_rate or check the data, then "
        "start again from the newest checkpoint"
    )
    return False


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
            "model.moe.expert_bias, bias_update_rate and auxiliary_loss_weight"
        )
    run.collapsed_blocks = frozenset(shares)
