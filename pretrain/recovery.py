"""What follows a step with non-finite gradients or a loss spike: continue, go back to the newest checkpoint, or end."""

from __future__ import annotations

from amfm.pretrain.checkpoint.names import newest_saved_step
from amfm.pretrain.monitor.anomalies import StepAnomaly, too_many_skips
from amfm.pretrain.run import Run
from amfm.pretrain.saving import finish_saving, restore_newest_weights, save


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
