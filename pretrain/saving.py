"""Save a run, resume it, and restore the weights of its newest checkpoint.

A checkpoint (checkpoint/save.py) holds what the engine has, and as its state the run's `Progress` and the loader's cursor.
`resume` restores all of it; a rollback restores the engine alone, because the steps in between are not taken back.
"""

from __future__ import annotations

from dataclasses import asdict, replace

from data_pipeline.progress import Report, silent
from pretrain.checkpoint.commit import SavedCheckpoint
from pretrain.checkpoint.load import LoadedCheckpoint, load_newest
from pretrain.run import Progress, Run
from pretrain.stages import is_guided


def resume(run: Run, report: Report = silent) -> LoadedCheckpoint | None:
    """Restore engine, progress and data from the newest checkpoint that verifies; None when there is none.

    What the run directory lacks is first fetched from `train.checkpoint_store`, if there is one. Every rank must call this.
    Raises as `load_newest` does.
    """
    passed_over: list[str] = []
    if run.saver.remote is not None:
        report("looking for checkpoints in the store")
        passed_over = run.saver.remote.pull_newer(run.directory / "checkpoints", run.saver.ranks)
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
    return loaded


def restore_newest_weights(run: Run) -> int | None:
    """Restore weights and optimizer from the newest checkpoint and return its step; None when there is none.

    Waits for a save in progress. Step and data stay where they are: the steps since the checkpoint count as skipped. Every
    rank must call this.
    """
    finish_saving(run)
    run.engine.wait_for_weights()
    if run.state_watch is not None:
        run.state_watch.forget()
    loaded = load_newest(run.directory / "checkpoints", run.saver.layout, config=run.config, identities=run.identities)
    if loaded is None:
        return None
    if is_guided(run.config, loaded.step) and run.model.config.guide is None:
        # Newer checkpoints are damaged, and this model has no place for the guides.
        raise RuntimeError(
            f"{loaded.path} is of a step in which factored matrices had guides, and this start has none; the same command "
            "goes on from it"
        )
    run.progress.skipped_steps += run.progress.step - loaded.step
    run.progress.skipped_in_row = 0
    is_same_stage = loaded.step > run.stage.first_step
    run.progress.recent_losses = Progress(**loaded.state["progress"]).recent_losses if is_same_stage else []
    run.saved_step = None
    return loaded.step


def save(run: Run) -> None:
    """Start a checkpoint of the current step, unless this step has one; its event is logged when it is on the disk.

    Every rank must call this. Raises RuntimeError when the previous save failed.
    """
    if run.saved_step == run.progress.step:
        return
    run.heartbeat.at(run.progress.step, "save")
    if run.state_watch is not None:
        run.state_watch.examine(run.progress.step)
    if run.log is not None:
        run.log.sync()
    loader_state = run.loader.state_dict()
    # Quarantined samples differ per rank; gather them.
    damages = [entry for entries in run.parallel.gather_objects(loader_state["quarantined"]) for entry in entries]
    loader_state["quarantined"] = sorted(damages)
    finished = run.saver.save(
        run.directory / "checkpoints",
        run.progress.step,
        state={"progress": asdict(run.progress), "loader": loader_state},
        config=run.config,
        identities=run.identities,
        keep_last=run.config.train.keep_last,
    )
    run.saved_step = run.progress.step
    record_saved(run, finished)
    if not run.config.train.checkpoint_in_background:
        finish_saving(run)


def finish_saving(run: Run) -> None:
    """Wait for the checkpoint in progress, if any. Every rank must call this; raises RuntimeError when it failed."""
    finished = run.saver.wait()
    record_saved(run, finished)


def record_saved(run: Run, saved: SavedCheckpoint | None) -> None:
    """Write down a checkpoint that stands, and what can't be cleared away around it."""
    if saved is None:
        return
    remarks = {"remarks": list(saved.remarks)} if saved.remarks else {}
    run.record_event("checkpoint", step=saved.step, path=saved.name, **remarks)
    if run.display is not None:
        run.display.show_checkpoint(saved.step)
    for remark in saved.remarks:
        run.say(f"warning: {remark}")
