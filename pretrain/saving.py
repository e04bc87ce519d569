"""Save a run, resume it, and restore the weights of its newest checkpoint.

A checkpoint (checkpoint/save.py) holds what the engine has, and as its state the run's `Progress` and the loader's
cursor. `resume` restores all of it; a rollback restores only the engine, because the steps in between are not taken
back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from amfm.data_pipeline.terminal import Report, silent
from amfm.pretrain.checkpoint.background import Saved
from amfm.pretrain.checkpoint.commit import RankFailure, SavedCheckpoint
from amfm.pretrain.checkpoint.load import LoadedCheckpoint, load_newest
from amfm.pretrain.checkpoint.manifest_file import checkpoint_name
from amfm.pretrain.checkpoint.remote import Pulled
from amfm.pretrain.checkpoint.replicas.memory import NodeMemory
from amfm.pretrain.checkpoint.replicas.replica import recover
from amfm.pretrain.monitor.ownership import read_owner
from amfm.pretrain.run import Progress, Run
from amfm.pretrain.stages import Built, is_due
from amfm.pretrain.step_sums import StepResult


def resume(run: Run, report: Report = silent) -> LoadedCheckpoint | None:
    """Restore engine, progress and data from the newest checkpoint that verifies; None when there is none.

    What the run directory lacks is first fetched from `train.checkpoint_store` and from the memory of the nodes, where
    the run has them. Every rank must call this. Raises as `load_newest` does.
    """
    pulled, resume_step = Pulled(), run.config.train.resume_step
    if resume_step is not None:
        from amfm.pretrain.rollback import roll_back_once

        roll_back_once(run.directory, resume_step, run.saver.remote, run.saver.ranks)
    if run.saver.remote is not None:
        report("looking for checkpoints in the store")
        pulled = run.saver.remote.pull_newer(run.directory / "checkpoints", run.saver.ranks)
    if run.saver.replicas is not None:
        report("looking for replicas in the memory of the nodes")
        recover_replicas(run, run.saver.replicas)
    loaded = load_newest(
        run.directory / "checkpoints",
        run.saver.layout,
        config=run.config,
        identities=run.identities,
        report=report,
    )
    if loaded is not None:
        loaded = replace(loaded, skipped=(*pulled.passed_over, *loaded.skipped), fetched=pulled.name)
        run.loader.load_state_dict(loaded.state["loader"])
        run.progress = Progress(**loaded.state["progress"])
        run.saved_step = loaded.step
    if run.saver.replicas is not None:
        # What was there is on the disk now, or cannot be had.
        run.saver.replicas.remarks += run.saver.replicas.clear()
        run.saver.replicas.check_memory(run.saver.measure(run.config), run.saver.ranks)
    return loaded


def recover_replicas(run: Run, replicas: NodeMemory) -> None:
    """Bring the newest replica to the checkpoints, or to those set aside where the run was rolled back since.

    Every rank must call this.
    """
    folder = run.directory / "checkpoints"
    recover(replicas, folder, lambda: (read_owner(run.directory) or {}).get("token"), run.saver.ranks)
    problem, last = RankFailure(), None
    if run.parallel.is_main:
        from amfm.pretrain.rollback import find_new_rollback

        with problem.caught():
            last = find_new_rollback(run.directory)
    run.saver.ranks.raise_together(problem.text, "what was set aside cannot be read")
    last = run.saver.ranks.broadcast(last)
    if last is not None:
        replicas.remarks.append(f"what was in memory before the rollback to step {last.step} goes to {last.folder}")
        recover(replicas, folder / last.folder, lambda: last.replicas_of, run.saver.ranks)


def restore_newest_weights(run: Run) -> int | None:
    """Restore weights and optimizer from the newest checkpoint and return its step; None when there is none.

    Waits for a save in progress. Step and data stay where they are: the steps since the checkpoint count as skipped.
    Every rank must call this.
    """
    finish_saving(run)
    run.engine.wait_for_weights()
    run.note_edit()
    loaded = load_newest(run.directory / "checkpoints", run.saver.layout, config=run.config, identities=run.identities)
    if loaded is None:
        return None
    unfit = run.built.explain_unfit(Built.for_step_after(loaded.step, run.config, run.stages))
    if unfit is not None:
        # Newer checkpoints are damaged, and this model has no place for what the older one holds.
        raise RuntimeError(f"{loaded.path} is {unfit}; the same command continues from it")
    then = Progress(**loaded.state["progress"])
    # Whether or not they were skipped already, when they were taken.
    run.progress.skipped_steps = then.skipped_steps + run.progress.step - loaded.step
    run.progress.skipped_in_row = 0
    is_same_stage = loaded.step > run.stage.first_step
    run.progress.recent_losses = then.recent_losses if is_same_stage else []
    run.progress.recent_norms = then.recent_norms if is_same_stage else []
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
    record_begun(run, finished)


def save_if_due(run: Run, result: StepResult) -> None:
    """After a step: learn how a save ended, and save where that is due. Every rank must call this."""
    if not result.is_saving:
        finish_saving(run)  # waits for nothing: a save that failed on any rank ends the run now, not at the next one
    step = run.progress.step
    if is_due(step, run.config.train.checkpoint_every_steps):
        save(run)
    elif not result.is_saving and step < run.last_step:
        for hook in run.hooks:
            hook.between_saves()


def collect_state(run: Run) -> dict[str, Any]:
    """What a checkpoint holds besides the engine's state, after the hooks had their look. Every rank must call this."""
    run.clock("save")
    for hook in run.hooks:
        hook.before_save()
    if run.files.log is not None:
        run.files.log.sync()
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


def record_begun(run: Run, finished: Saved | None) -> None:
    """After a save or replica was begun: record the one before; wait for this one where the run asks for it."""
    record_saved(run, finished)
    if not run.config.train.checkpoint_in_background:
        finish_saving(run)


def finish_saving(run: Run) -> None:
    """Wait for what is being saved, if anything. Every rank must call this; raises RuntimeError when it failed."""
    record_saved(run, run.saver.wait())


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
    """Upload the last checkpoint if it is missing, with one retry; returns whether the store has it.

    Every rank must call this.
    """
    if not send_missing_copy(run):
        return True
    finish_saving(run)
    if not lacks_copy(run):
        return True
    error = (
        f"the checkpoint of step {run.progress.step} is in {run.directory} and not in "
        f"train.checkpoint_store={run.config.train.checkpoint_store}; the same command sends it"
    )
    run.tell("failed", error, error=error)
    return False


def record_saved(run: Run, saved: Saved | None) -> None:
    """Record what was saved, as it describes itself, and say what went wrong around it."""
    if saved is None:
        return
    run.record_event(saved.event, step=saved.step, **saved.facts())
    if run.files.display is not None and isinstance(saved, SavedCheckpoint):
        run.files.display.show_checkpoint(saved.step)
    for warning in saved.warnings():
        run.say(f"warning: {warning}")
