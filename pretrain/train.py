"""The training loop, from a configuration to a finished run.

`train` builds a run (start.py), steps it to its end (step.py) and closes it. What it does besides that is a hook
(hook.py): validation, tasks, the log and everything else that looks at a run or edits it between steps.

Every rank runs the same lines. What only one rank knows (a signal, a NaN, a damaged sample) is reduced or gathered
inside the step, before anything branches on it: ranks that branched differently would wait in different collectives.

A run resumes with bitwise identical results because all that changes is in four places, and each is in every checkpoint: `Progress`, the
loader's cursor, the engine and the random generators. Learning rate, batch size, stage and order of samples are
functions of the step, so the loop has no state of its own.

A step with non-finite gradients or a loss spike is a `StepAnomaly`. The step itself was skipped on every rank or
applied on every rank; `handle_anomaly` then continues, goes back to the newest checkpoint's weights, or ends the run,
as the section `health` says.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from amfm.data_pipeline.terminal import Waiting
from amfm.pretrain.checkpoint.manifest_file import newest_saved_step
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.failures import describe, is_bug, while_running
from amfm.pretrain.hook import HookMaker
from amfm.pretrain.launcher_protocol import DONE, INTERRUPTED, NEXT_LAYOUT, RUN_FAILED
from amfm.pretrain.monitor.anomalies import StepAnomaly, too_many_skips
from amfm.pretrain.monitor.beats import describe_lost
from amfm.pretrain.monitor.guard import START_MARGIN_SECONDS, Guard
from amfm.pretrain.monitor.signals import SignalWatch, signal_name
from amfm.pretrain.parallel import is_first_rank
from amfm.pretrain.run import Run, apply_stage
from amfm.pretrain.saving import (
    finish_copies,
    finish_saving,
    restore_newest_weights,
    save,
    save_if_due,
    send_missing_copy,
)
from amfm.pretrain.start import announce_fresh_start, close_run, needed_now, start_run
from amfm.pretrain.step import train_step


def train(config: RunConfig, hooks: Sequence[HookMaker] = ()) -> int:
    """Train, resuming on its own from `run.dir`, and return the exit code. Every rank must call this.

    hooks: built from the run, next to those of the configuration.

    0: the steps asked for are done, or SIGTERM, SIGUSR1 or SIGHUP asked to stop, and everything is saved. 130: Ctrl-C, saved.
    3: an anomaly ended the run (`handle_anomaly`), or `train.checkpoint_store` does not take its last checkpoint; the
    newest checkpoint stands. 4: the next step needs ranks that are rebuilt, and everything is saved: the same
    command continues.

    Raises ValueError for settings and data that do not fit, OSError while it starts, RuntimeError for the machine's
    state and for all that ends a run under way; where another rank is gone, the message names it.
    """
    start_seconds = config.train.timeout_seconds + START_MARGIN_SECONDS
    with (
        Guard(int(os.environ.get("RANK", "0")), start_seconds) as guard,
        SignalWatch(announces=is_first_rank()) as signals,
    ):
        # Outside of `while_running`: what fails in the start may be a setting, and keeps that exit code.
        with Waiting("amfm train", speaks=is_first_rank()) as waiting:
            run = start_run(config, signals, guard.hearing(waiting), hooks)
        run.heartbeat.take_guard(guard)
        began = run.progress.step
        with while_running():
            try:
                with while_running():
                    code = run_steps(run)
                    for hook in run.hooks:
                        hook.at_end()
                    return code
            except RuntimeError as error:
                from amfm.pretrain.hooks.own_code import describe_in, own_code_error

                text = record_failure(run, describe_in(error, run.heartbeat.phase()))
                # A bug keeps its type and traceback, and an unchanged message needs no second error around it.
                if is_bug(error):
                    raise
                own = own_code_error(error, text, in_first_step=run.progress.step == began)
                if own is None and text == str(error):
                    raise
                raise own or RuntimeError(text) from error
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
    """Step until the last step, or what ends the run before; returns the exit code. Every rank must call this."""
    send_missing_copy(run)
    while run.progress.step < run.last_step:
        if needed_now(run) != run.built:
            return leave_for_fresh_start(run)
        apply_stage(run)
        with run.profiler.trace(run.progress.step + 1):
            result = train_step(run)
        for hook in run.hooks:
            hook.after_step(result)
        if result.anomaly is not None and not handle_anomaly(run, result.anomaly):
            return RUN_FAILED
        if result.signal:
            return stop_on_signal(run, result.signal)
        save_if_due(run, result)
    return finish(run)


def finish(run: Run) -> int:
    """Save and end a run that has done its steps; returns the exit code. Every rank must call this."""
    save(run)
    finish_saving(run)
    if not finish_copies(run):
        return RUN_FAILED
    step, steps = run.progress.step, run.num_steps
    if step >= steps:
        run.tell("end", f"finished at step {step} of {steps}; saved", reason="finished")
    else:
        run.tell("end", f"stopped at step {step} of {steps}; saved", reason="stop_after_steps")
    return DONE


def leave_for_fresh_start(run: Run) -> int:
    """Save and end where ranks must be rebuilt; returns the exit code. Every rank must call this."""
    save(run)
    finish_saving(run)
    # One that came since the last step's reduction, while this was saved, belongs to no one after this process.
    (number,) = run.parallel.max_over_all([run.signals.received])
    if number:
        return stop_on_signal(run, number)
    announce_fresh_start(run)
    return NEXT_LAYOUT


def stop_on_signal(run: Run, number: int) -> int:
    """Save and end, because a signal asked any of the ranks to; returns the exit code. Every rank must call this."""
    save(run)
    finish_saving(run)
    name = signal_name(number)
    run.tell("signal", f"{name}: saved at step {run.progress.step}; the same command continues from there", name=name)
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
    """Restore the newest checkpoint's weights and continue with the data after this step; False when that is not
    possible.

    The data that led here is not read again, and the steps since the checkpoint count as skipped, so that schedule,
    stages and data stay functions of the step. Saves at once: a restart must not meet the old data again. Every rank
    must call this.
    """
    progress, limit = run.progress, run.config.health.max_rollbacks
    if progress.rollbacks >= limit:
        return abort_run(run, f"{anomaly.text}, after {limit} rollbacks (health.max_rollbacks)")
    back_at = restore_newest_weights(run)
    if back_at is None:
        return abort_run(run, f"{anomaly.text}, and there is no checkpoint to go back to")
    # Counted in the saved progress, so that restarts cannot roll back for ever.
    progress.rollbacks += 1
    for hook in run.hooks:
        hook.after_rollback()
    run.tell(
        "rolled_back",
        f"step {progress.step}: {anomaly.text}; back to the weights of step {back_at}, on with the data after step "
        f"{progress.step}",
        cause=anomaly.text,
        weights_of_step=back_at,
        rollbacks=progress.rollbacks,
    )
    save(run)
    return True


def abort_run(run: Run, cause: str) -> bool:
    """Give up a run that no longer learns, saying what to do; the newest checkpoint stays.

    Every rank must call this.
    """
    finish_saving(run)
    again = "again" if newest_saved_step(run.config.run.dir) < 0 else "again from the newest checkpoint"
    run.tell(
        "gave_up",
        f"{cause}; events.jsonl names the samples and parameters. Lower optimizer.learning_rate or check the data, "
        f"then start {again}",
        cause=cause,
        skipped_in_row=run.progress.skipped_in_row,
    )
    return False
