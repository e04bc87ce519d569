"""Save a run, resume it, and restore the weights of its newest checkpoint.

A checkpoint (checkpoint/save.py) holds what the engine has, and as its state the run's `Progress` and the loader's cursor.
`resume` restores all of it; a rollback restores the engine alone, because the steps in between are not taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from amfm.data_pipeline.progress import Report, silent
from amfm.pretrain.checkpoint.background import Saved
from amfm.pretrain.checkpoint.load import LoadedCheckpoint, load_newest
from amfm.pretrain.checkpoint.names import checkpoint_name
from amfm.pretrain.checkpoint.remote import SentCopy
from amfm.pretrain.checkpoint.replicas.recover import recover
from amfm.pretrain.checkpoint.replicas.write import SavedReplica
from amfm.pretrain.monitor.ownership import read_owner
from amfm.pretrain.run import Progress, Run
from amfm.pretrain.stages import is_due, is_guided
from amfm.pretrain.step_sums import StepResult


def resume(run: Run, report: Report = silent) -> LoadedCheckpoint | None:
    """Restore engine, progress and data from the newest checkpoint that verifies; None when there is none.

    What the run directory lacks is first fetched from `train.checkpoint_store` and from the memory of the nodes, where the
    run has them. Every rank must call this. Raises as `load_newest` does.
    """
    passed_over: list[str] = []
    if run.saver.remote is not None:
        report("looking for checkpoints in the store")
        passed_over = run.saver.remote.pull_newer(run.directory / "checkpoints", run.saver.ranks)
    if run.saver.replicas is not None:
        report("looking for replicas in the memory of the nodes")
        recover(
            run.saver.replicas,
            run.directory,
            lambda: (read_owner(run.directory) or {}).get("token"),
            run.saver.ranks,
        )
    loaded = load_newest(
        run.directory / "checkpoints",
        run.saver.layout,
        config=run.config,
        identities=run.identities,
        report=report,
    )
    if loaded is not None:
        loaded = replace(loaded, skipped=(*passed_over, *loaded.skipped))
        run.loader.load_state_dict(loaded.state["loader"])
        run.progress = Progress(**loaded.state["progress"])
        run.saved_step = loaded.step
    if run.saver.replicas is not None:
        # What was there is on the disk now, or can't be had.
        run.saver.replicas.remarks += run.saver.replicas.clear()
        run.saver.replicas.check_room(run.saver.measure(run.config), run.saver.ranks)
    return loaded


def restore_newest_weights(run: Run) -> int | None:
    """Restore weights and optimizer from the newest checkpoint and return its step; None when there is none.

    Waits for a save in progress. Step and data stay where they are: the steps since the checkpoint count as skipped. Every
    rank must call this.
    """
    finish_saving(run)
    run.engine.wait_for_weights()
    run.note_edit()
    loaded = load_newest(run.directory / "checkpoints", run.saver.layout, config=run.config, identities=run.identities)
    if loaded is None:
        return None
    if is_guided(run.config, loaded.step) and run.model.config.guide is None:
        # Newer checkpoints are damaged, and this model has no place for the guides.
        raise RuntimeError(
            f"{loaded.path} is of a step in which factored matrices had guides, and this start has none; the same command "
            "goes on from it"
        )
    then = Progress(**loaded.state["progress"])
    # Whether or not they were skipped already, when they were taken.
    run.progress.skipped_steps = then.skipped_steps + run.progress.step - loaded.step
    run.progress.skipped_in_row = 0
    run.progress.recent_losses = then.recent_losses if loaded.step > run.stage.first_step else []
    run.saved_step = None
    return loaded.step


def save(run: Run) -> None:
    """Start a checkpoint of the current step, unless this step has one; its event is logged when it is on the disk.

    Every rank must call this. Raises RuntimeError when the previous save failed.
    """
    if run.saved_step == run.progress.step:
        return
    state = collect_state(run)
    finished = run.saver.save(
        run.directory / "checkpoints", run.progress.step, **state, keep_last=run.config.train.keep_last
    )
    run.saved_step = run.progress.step
    record_saved(run, finished)
    if not run.config.train.checkpoint_in_background:
        finish_saving(run)


def save_if_due(run: Run, result: StepResult) -> None:
    """After a step: hear of a save that ended, save or replicate where that is due. Every rank must call this."""
    if not result.is_saving:
        finish_saving(run)  # waits for nothing: a save that failed on any rank ends the run now, not at the next one
    step = run.progress.step
    if is_due(step, run.config.train.checkpoint_every_steps):
        save(run)
    elif not result.is_saving and step < run.last_step:
        replicate_if_due(run)


def replicate_if_due(run: Run) -> None:
    """Start a replica where the newest checkpoint or replica is `train.replica_every_steps` old. Every rank must call this.

    Only while nothing is being written: a replica must not make steps wait for a checkpoint on a slow disk.
    """
    every, step = run.config.train.replica_every_steps, run.progress.step
    if every is None or step - max(run.saved_step or 0, run.replica_step) < every:
        return
    finished = run.saver.replicate(step, **collect_state(run))
    run.replica_step = step
    record_saved(run, finished)
    if not run.config.train.checkpoint_in_background:
        finish_saving(run)


def collect_state(run: Run) -> dict[str, Any]:
    """What a checkpoint holds beside the engine's state, after a look for silent corruption. Every rank must call this."""
    run.heartbeat.at(run.progress.step, "save")
    for hook in run.hooks:
        hook.before_save()
    if run.log is not None:
        run.log.sync()
    loader_state = run.loader.state_dict()
    loader_state["quarantined"] = join_damages(run.parallel.gather_objects(loader_state["quarantined"]))
    return {
        "state": {"progress": asdict(run.progress), "loader": loader_state},
        "config": run.config,
        "identities": run.identities,
    }


def join_damages(of_ranks: Sequence[Sequence[list[Any]]]) -> list[list[Any]]:
    """Join what ranks quarantined ([sample, part, reason] each), in the order of the samples, a sample once.

    Ranks that read the same rows find the same damage, and after a resume all ranks know of what any had found before.
    """
    by_sample = {damage[0]: damage for damages in of_ranks for damage in damages}
    return [by_sample[sample] for sample in sorted(by_sample)]


def finish_saving(run: Run) -> None:
    """Wait for the checkpoint in progress, if any. Every rank must call this; raises RuntimeError when it failed."""
    finished = run.saver.wait()
    record_saved(run, finished)


def send_missing_copy(run: Run) -> bool:
    """Begin to send the newest checkpoint where `train.checkpoint_store` lacks it; returns whether it did.

    A kill, or the network, ended the copy before; or the run has a store since now. Every rank must call this.
    """
    if run.saved_step is None or not lacks_copy(run):
        return False
    newest = run.directory / "checkpoints" / checkpoint_name(run.saved_step)
    record_saved(run, run.saver.send(newest, run.config.train.keep_last))
    return True


def lacks_copy(run: Run) -> bool:
    """Whether the run has a store that lacks a copy of its newest checkpoint. Every rank must call this."""
    remote = run.saver.remote
    if remote is None or run.saved_step is None:
        return False
    return remote.lacks(checkpoint_name(run.saved_step), run.saver.ranks)


def finish_copies(run: Run) -> bool:
    """See to it that the store has the last checkpoint, trying once more; returns whether it has. Every rank must call this."""
    if not send_missing_copy(run):
        return True
    finish_saving(run)
    if not lacks_copy(run):
        return True
    text = (
        f"the checkpoint of step {run.progress.step} is in {run.directory} and not in "
        f"train.checkpoint_store={run.config.train.checkpoint_store}; the same command sends it"
    )
    run.record_event("failed", error=text)
    run.say(text)
    return False


def record_saved(run: Run, saved: Saved | None) -> None:
    """Write down a checkpoint that stands, and what can't be cleared away around it; a copy; a replica, or why there is none."""
    if saved is None:
        return
    if isinstance(saved, SentCopy):
        run.record_event("copied", step=saved.step, problem=saved.remarks[0] if saved.remarks else None)
        for remark in saved.remarks:
            run.say(f"warning: {remark}")
        return
    if isinstance(saved, SavedReplica):
        facts = {"bytes": saved.num_bytes, "seconds": saved.seconds} if saved.problem is None else {}
        run.record_event("replica", step=saved.step, problem=saved.problem, **facts)
        if saved.problem is not None:
            run.say(f"warning: the replica of step {saved.step} was not written, training goes on: {saved.problem}")
        return
    remarks = {"remarks": list(saved.remarks)} if saved.remarks else {}
    run.record_event("checkpoint", step=saved.step, path=saved.name, **remarks)
    if run.display is not None:
        run.display.show_checkpoint(saved.step)
    for remark in saved.remarks:
        run.say(f"warning: {remark}")
